// Rows of a 3x3 convolution on matrix tiles; compiled where the compiler has them, and emulated for tests.
#include "conv3x3/conv3x3_tiles.h"

#include "cpu/vector.h"
#include "tiles.h"

namespace ftfast {
namespace FTFAST_INSTRUCTION_SET {
namespace {

constexpr int64_t numbers_of_tile = tile_rows * tile_columns;

typedef uint16_t Line __attribute__((vector_size(64)));  // the 32 channels that one instruction sums over

inline void store_line(uint16_t* to, Line line) { std::memcpy(to, &line, sizeof line); }

inline void clear_cells(uint16_t* to, int64_t cells, int64_t channels) {
  const int64_t size = cell_size(channels);
  for (int64_t cell = 0; cell < cells; ++cell)
    for (int64_t c = 0; c < channels; c += tile_columns) store_line(to + cell * size + c, Line{});
}

// Channels are filled up to a whole line.
inline void copy_pixels(const uint16_t* from, uint16_t* to, int64_t pixels, int64_t channels) {
  const int64_t size = cell_size(channels);
  for (int64_t pixel = 0; pixel < pixels; ++pixel, from += channels, to += size) {
    int64_t c = 0;
    for (; c + tile_columns <= channels; c += tile_columns) store_line(to + c, load_bytes<Line>(from + c));
    if (c == channels) continue;
    Line half = {};
    std::memcpy(&half, from + c, sizeof half / 2);
    store_line(to + c, half);
  }
}

void pack_rows(const DirectConvolution& work, int64_t first, int64_t last, uint16_t* cells) {
  const int64_t height = work.height, width = work.width, channels = work.channels;
  const int64_t row_cells = width + 1, size = cell_size(channels), samples_row = height + 1;
  const int64_t from = row_of_cells(first, height) - 1, to = row_of_cells(last - 1, height) + 1;
  for (int64_t row = from; row <= to; ++row) {
    uint16_t* const at = cells + (row - from) * row_cells * size;
    if (row % samples_row == 0) {
      clear_cells(at, row_cells, channels);
      continue;
    }
    clear_cells(at, 1, channels);
    copy_pixels(work.input + (row - row / samples_row - 1) * width * channels, at + size, width, channels);
  }
  const int64_t filled = (to - from + 1) * row_cells;
  clear_cells(cells + filled * size, cells_read(cells_between(first, last, height, width), width) - filled, channels);
}

// sums[cell, output] of 16 or 32 cells for 16 or 32 outputs. Channels are the outer loop, so that a line of the input
// comes to the nearest cache once for all nine taps.
template <int tall, int wide>
inline void multiply(const DirectConvolution& work, const uint16_t* cells, float* sums) {
  const int64_t row_cells = work.width + 1, size = cell_size(work.channels), bytes = 2 * size;
  const uint16_t* weight = work.weight;
  tile_zero(0);
  if constexpr (wide == 2) tile_zero(1);
  if constexpr (tall == 2) tile_zero(2);
  if constexpr (tall == 2 && wide == 2) tile_zero(3);
  for (int64_t c = 0; c < work.channels; c += tile_columns)
    for (int64_t ky = 0; ky < 3; ++ky)
      for (int64_t kx = 0; kx < 3; ++kx, weight += wide * numbers_of_tile) {
        const uint16_t* const at = cells + (ky * row_cells + kx) * size + c;
        tile_load(4, at, bytes);
        tile_load(6, weight, 64);
        tile_add_products(0, 4, 6);
        if constexpr (wide == 2) {
          tile_load(7, weight + numbers_of_tile, 64);
          tile_add_products(1, 4, 7);
        }
        if constexpr (tall == 2) {
          tile_load(5, at + tile_rows * size, bytes);
          tile_add_products(2, 5, 6);
        }
        if constexpr (tall == 2 && wide == 2) tile_add_products(3, 5, 7);
      }
  constexpr int64_t sums_row = tile_columns * int64_t(sizeof(float));
  tile_store(0, sums, sums_row);
  if constexpr (wide == 2) tile_store(1, sums + tile_rows, sums_row);
  if constexpr (tall == 2) tile_store(2, sums + tile_rows * tile_columns, sums_row);
  if constexpr (tall == 2 && wide == 2) tile_store(3, sums + tile_rows * tile_columns + tile_rows, sums_row);
}

template <int wide>
inline void finish_pixel(const DirectConvolution& work, const float* sums, int64_t pixel) {
  const Floats zero = {}, slope = zero + work.negative_slope;
  for (int64_t k = 0; k < wide * tile_rows; k += float_lanes) {
    const int64_t at = pixel * work.outputs + k;
    Floats value = load(sums + k);
    if (work.bias) value += load(work.bias + k);
    if (work.residual) value += load(reinterpret_cast<const BFloat16*>(work.residual + at));
    value = value < zero ? value * slope : value;
    store(reinterpret_cast<BFloat16*>(work.result + at), value);
  }
}

template <int wide>
void rows(const DirectConvolution& work, int64_t first, int64_t last, const uint16_t* cells) {
  const int64_t count = cells_between(first, last, work.height, work.width), size = cell_size(work.channels);
  alignas(64) float sums[2 * tile_rows * tile_columns];
  // Where the next cell lies; pixels follow each other as their cells do.
  int64_t x = 0, y = first % work.height, pixel = first * work.width;
  for (int64_t cell = 0; cell < count; cell += 2 * tile_rows) {
    const int64_t left = count - cell, ready = left < 2 * tile_rows ? left : 2 * tile_rows;
    if (left > tile_rows) multiply<2, wide>(work, cells + cell * size, sums);
    else multiply<1, wide>(work, cells + cell * size, sums);
    for (int64_t i = 0; i < ready; ++i) {
      if (x < work.width && y < work.height) finish_pixel<wide>(work, sums + i * tile_columns, pixel++);
      if (++x > work.width) {
        x = 0;
        y = y == work.height ? 0 : y + 1;
      }
    }
  }
}

// The weights of up to 32 outputs and 32 channels, copied to where any order of them is in the nearest cache. From one
// to the next of whichever lies further apart is an odd number of lines here.
struct NearWeight {
  static constexpr int64_t far_stride = 9 * tile_columns + 16;
  alignas(64) float numbers[tile_columns * far_stride];

  NearWeight(const float* from, int64_t far, int64_t far_step, int64_t near, int64_t near_step,
             const int64_t tap_steps[2]) {
    const bool is_one_run = near_step == 9 && tap_steps[0] == 3 && tap_steps[1] == 1;
    for (int64_t i = 0; i < far; ++i) {
      const float* const at = from + i * far_step;
      float* const to = numbers + i * far_stride;
      if (is_one_run) std::memcpy(to, at, size_t(9 * near) * sizeof(float));
      else
        for (int64_t tap = 0; tap < 9; ++tap)
          for (int64_t j = 0; j < near; ++j)
            to[9 * j + tap] = at[tap / 3 * tap_steps[0] + tap % 3 * tap_steps[1] + j * near_step];
    }
  }
};

// 16 numbers this far apart.
inline void gather(const float* from, int64_t stride, float* to) {
#if defined(__AVX512F__)
  const __m512i lanes = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  const __m512i at = _mm512_mullo_epi32(lanes, _mm512_set1_epi32(int(stride)));
  _mm512_store_ps(to, _mm512_mask_i32gather_ps(_mm512_setzero_ps(), 0xffff, at, from, sizeof(float)));
#else
  for (int64_t i = 0; i < tile_rows; ++i) to[i] = from[i * stride];
#endif
}

void pack_weight(const float* from, int64_t output_step, int64_t channel_step, const int64_t tap_steps[2],
                 int64_t outputs, int64_t channels, bool flipped, uint16_t* to) {
  const bool outputs_are_far = output_step > channel_step;
  const NearWeight weight = outputs_are_far
      ? NearWeight(from, outputs, output_step, channels, channel_step, tap_steps)
      : NearWeight(from, channels, channel_step, outputs, output_step, tap_steps);
  const int64_t output_stride = outputs_are_far ? NearWeight::far_stride : 9;
  const int64_t channel_stride = outputs_are_far ? 9 : NearWeight::far_stride;
  const BFloat16* const bits = nullptr;  // which kind of 16 bits
  const int64_t halves = outputs / tile_rows;
  for (int64_t half = 0; half < halves; ++half)
    for (int64_t pair = 0; pair < tile_rows; ++pair)
      for (int64_t tap = 0; tap < 9; ++tap) {
        alignas(64) float first[tile_rows] = {}, second[tile_rows] = {};
        if (2 * pair < channels) {
          const float* const at = weight.numbers + (flipped ? 8 - tap : tap) + half * tile_rows * output_stride;
          gather(at + 2 * pair * channel_stride, output_stride, first);
          gather(at + (2 * pair + 1) * channel_stride, output_stride, second);
        }
        uint16_t* const target = to + (tap * halves + half) * numbers_of_tile + pair * tile_columns;
        for (int64_t k = 0; k < tile_rows; k += float_lanes) {
          const Words low = __builtin_convertvector(to_halves(bits, load(first + k)), Words);
          const Words high = __builtin_convertvector(to_halves(bits, load(second + k)), Words);
          const Words words = low | high << 16;
          std::memcpy(target + 2 * k, &words, sizeof words);
        }
      }
}

}  // namespace

TileKernels tile_kernels() { return {begin_tiles, end_tiles, pack_weight, pack_rows, rows<1>, rows<2>}; }

}  // namespace FTFAST_INSTRUCTION_SET
}  // namespace ftfast
