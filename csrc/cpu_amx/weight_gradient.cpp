// The weight gradient of a 3x3 convolution on matrix tiles; compiled where the compiler has them, and emulated for tests.
#include "conv3x3/conv3x3_tiles.h"

#include "cpu/vector.h"
#include "rows/gather.h"
#include "tiles.h"

namespace ftfast {
namespace FTFAST_INSTRUCTION_SET {
namespace {

constexpr int64_t words_of_tile = tile_rows * tile_rows;

inline Words channels_of(const uint16_t* pixel) {
  return __builtin_convertvector(load_bytes<Halves>(pixel), Words);
}

// 16 channels of a pixel of two samples; null for a missing one.
inline void store_words(const uint16_t* first, const uint16_t* second, uint32_t* to) {
  for (int64_t c = 0; c < tile_rows; c += float_lanes) {
    Words words = {};
    if (first) words = channels_of(first + c);
    if (second) words |= channels_of(second + c) << 16;
    std::memcpy(to + c, &words, sizeof words);
  }
}

void pack_input(const uint16_t* first, const uint16_t* second, uint32_t* to, int64_t pixels, int64_t empty,
                int64_t channels, int64_t stride) {
  for (int64_t block = 0; block < channels; block += tile_rows, to += stride) {
    uint32_t* cell = to;
    store_words(nullptr, nullptr, cell);
    for (int64_t at = block, end = block + pixels * channels; at < end; at += channels)
      store_words(first + at, second ? second + at : nullptr, cell += tile_rows);
    for (int64_t i = 0; i < empty; ++i) store_words(nullptr, nullptr, cell += tile_rows);
  }
}

void pack_gradient(const uint16_t* const first[tile_rows], const uint16_t* const second[tile_rows], uint32_t* to,
                   int64_t channels, int64_t stride) {
  for (int64_t block = 0; block < channels; block += tile_rows, to += stride) {
    alignas(64) uint32_t words[words_of_tile];
    for (int64_t i = 0; i < tile_rows; ++i)
      store_words(first[i] ? first[i] + block : nullptr, second[i] ? second[i] + block : nullptr, words + i * tile_rows);
    Block<uint32_t, 64>::transpose(to, tile_rows, words, tile_rows);
  }
}

// Tiles of the gradient are 16 outputs by 16 cells, those of the input 16 cells by 16 channels.
template <int outputs, int channels>
inline void add(const uint32_t* input, int64_t input_stride, const uint32_t* gradient, int64_t gradient_stride,
                int64_t tiles, bool first, float* sums) {
  constexpr int64_t sums_row = tile_columns * int64_t(sizeof(float));
  float *const right = sums + tile_rows, *const below = sums + tile_rows * tile_columns, *const last = below + tile_rows;
  if (first) {
    tile_zero(0);
    if constexpr (channels == 2) tile_zero(1);
    if constexpr (outputs == 2) tile_zero(2);
    if constexpr (outputs == 2 && channels == 2) tile_zero(3);
  } else {
    tile_load(0, sums, sums_row);
    if constexpr (channels == 2) tile_load(1, right, sums_row);
    if constexpr (outputs == 2) tile_load(2, below, sums_row);
    if constexpr (outputs == 2 && channels == 2) tile_load(3, last, sums_row);
  }
  for (int64_t tile = 0; tile < tiles; ++tile, input += words_of_tile, gradient += words_of_tile) {
    tile_load(4, gradient, 64);
    tile_load(6, input, 64);
    tile_add_products(0, 4, 6);
    if constexpr (channels == 2) {
      tile_load(7, input + input_stride, 64);
      tile_add_products(1, 4, 7);
    }
    if constexpr (outputs == 2) {
      tile_load(5, gradient + gradient_stride, 64);
      tile_add_products(2, 5, 6);
    }
    if constexpr (outputs == 2 && channels == 2) tile_add_products(3, 5, 7);
  }
  tile_store(0, sums, sums_row);
  if constexpr (channels == 2) tile_store(1, right, sums_row);
  if constexpr (outputs == 2) tile_store(2, below, sums_row);
  if constexpr (outputs == 2 && channels == 2) tile_store(3, last, sums_row);
}

void add_blocks(const uint32_t* input, int64_t input_stride, int64_t input_blocks, const uint32_t* gradient,
                int64_t gradient_stride, int64_t gradient_blocks, int64_t tiles, bool first, float* sums) {
  const auto run = gradient_blocks == 2 ? (input_blocks == 2 ? add<2, 2> : add<2, 1>)
                                        : (input_blocks == 2 ? add<1, 2> : add<1, 1>);
  run(input, input_stride, gradient, gradient_stride, tiles, first, sums);
}

}  // namespace

TileGradientKernels tile_gradient_kernels() { return {begin_tiles, end_tiles, pack_input, pack_gradient, add_blocks}; }

}  // namespace FTFAST_INSTRUCTION_SET
}  // namespace ftfast
