// The driver of the weight gradient on matrix tiles: packs both maps, then shares blocks of the result between threads.
#include <algorithm>

#include "conv3x3_tiles.h"
#include "scratch.h"

namespace ftfast {
namespace {

// Tiles of one block of either map over which all taps are summed while they are in a core's second cache: 128 KiB of
// each map. Between them the sums go to memory and back, which does not change them.
constexpr int64_t tiles_at_once = 64;

// Multiplications that are worth a second thread: waking one costs microseconds.
constexpr int64_t products_per_thread = 1 << 22;

constexpr int64_t words_of_tile = tile_rows * tile_rows;

constexpr int64_t parts_of(int64_t whole, int64_t part) { return (whole + part - 1) / part; }

// Both maps, packed. A cell of the gradient is the pixel in the middle of the taps of as many cells of the input.
struct Packed {
  int64_t row_cells, samples_rows, rows;  // of a sample with the empty row after it, and of all pairs
  int64_t tiles, input_cells;
  uint32_t *input, *gradient;

  int64_t input_block() const { return input_cells * tile_rows; }
  int64_t gradient_block() const { return tiles * words_of_tile; }
};

// First and second sample of a pair; null where the last is alone.
struct Pair {
  const uint16_t *first, *second;
};
Pair pair_of(const uint16_t* map, int64_t pair, int64_t samples, int64_t sample_size) {
  const uint16_t* const first = map + 2 * pair * sample_size;
  return {first, 2 * pair + 1 < samples ? first + sample_size : nullptr};
}

void pack_input_row(const TileGradientKernels& kernels, const WeightGradient& work, const Packed& packed, int64_t row) {
  const int64_t pair = (row - 1) / packed.samples_rows, y = row % packed.samples_rows - 1;
  uint32_t* const to = packed.input + row * packed.row_cells * tile_rows;
  if (y >= 0) {
    const int64_t sample = work.height * work.width * work.channels, at = y * work.width * work.channels;
    const Pair of = pair_of(work.input, pair, work.samples, sample);
    kernels.pack_input(of.first + at, of.second ? of.second + at : nullptr, to, work.width, 0, work.channels,
                       packed.input_block());
    return;
  }
  // The last row goes on to the end of what tiles read.
  const int64_t cells = row == packed.rows ? packed.input_cells - row * packed.row_cells : packed.row_cells;
  kernels.pack_input(nullptr, nullptr, to, 0, cells - 1, work.channels, packed.input_block());
}

void pack_gradient_tile(const TileGradientKernels& kernels, const WeightGradient& work, const Packed& packed,
                        int64_t tile) {
  const uint16_t *first[tile_rows] = {}, *second[tile_rows] = {};
  const int64_t sample = work.height * work.width * work.outputs;
  for (int64_t i = 0; i < tile_rows; ++i) {
    const int64_t cell = tile * tile_rows + i, row = cell / packed.row_cells, x = cell % packed.row_cells;
    const int64_t pair = row / packed.samples_rows, y = row % packed.samples_rows;
    if (x == work.width || y == work.height || row >= packed.rows) continue;
    const int64_t at = (y * work.width + x) * work.outputs;
    const Pair of = pair_of(work.gradient, pair, work.samples, sample);
    first[i] = of.first + at;
    second[i] = of.second ? of.second + at : nullptr;
  }
  kernels.pack_gradient(first, second, packed.gradient + tile * words_of_tile, work.outputs, packed.gradient_block());
}

// Taps first to last - 1 of one block of the result, summed over all tiles in order.
void sum_block(const TileGradientKernels& kernels, const WeightGradient& work, const Packed& packed, int64_t k,
               int64_t c, int64_t first, int64_t last) {
  const int64_t outputs = std::min(tile_columns, work.outputs - k), channels = std::min(tile_columns, work.channels - c);
  const uint32_t* const input = packed.input + c / tile_rows * packed.input_block();
  const uint32_t* const gradient = packed.gradient + k / tile_rows * packed.gradient_block();
  alignas(64) float sums[9][tile_columns * tile_columns];
  for (int64_t tile = 0; tile == 0 || tile < packed.tiles; tile += tiles_at_once)
    for (int64_t tap = first; tap < last; ++tap) {
      const int64_t shift = tap / 3 * packed.row_cells + tap % 3;
      kernels.add(input + tile * words_of_tile + shift * tile_rows, packed.input_block(), channels / tile_rows,
                  gradient + tile * words_of_tile, packed.gradient_block(), outputs / tile_rows,
                  std::min(tiles_at_once, packed.tiles - tile), tile == 0, sums[tap]);
    }
  for (int64_t i = 0; i < outputs; ++i)
    for (int64_t j = 0; j < channels; ++j) {
      float* const to = work.result + (k + i) * work.strides[0] + (c + j) * work.strides[1];
      for (int64_t tap = first; tap < last; ++tap)
        to[tap / 3 * work.strides[2] + tap % 3 * work.strides[3]] = sums[tap][i * tile_columns + j];
    }
}

}  // namespace

void conv3x3_tiles_weight_gradient(const WeightGradient& work) {
  const TileGradientKernels kernels = tile_gradient_kernels();
  Packed packed;
  packed.row_cells = work.width + 1;
  packed.samples_rows = work.height + 1;
  packed.rows = (work.samples + 1) / 2 * packed.samples_rows;
  const int64_t cells = std::max<int64_t>(0, (packed.rows - 1) * packed.row_cells - 1);
  packed.tiles = parts_of(cells, tile_rows);
  packed.input_cells = cells_read(cells, work.width);
  const int64_t input_words = packed.input_cells * work.channels, gradient_words = packed.tiles * tile_rows * work.outputs;
  const int64_t bytes = (input_words + gradient_words) * int64_t(sizeof(uint32_t));
  thread_local Scratch kept;
  Scratch passing;
  packed.input = static_cast<uint32_t*>((bytes <= bytes_kept ? kept : passing).of_size(bytes));
  packed.gradient = packed.input + input_words;

  const int64_t products = 2 * cells * 9 * work.channels * work.outputs;
  const int workers = int(std::max<int64_t>(1, std::min<int64_t>(work.threads, products / products_per_thread)));
  const int64_t input_blocks = parts_of(work.channels, tile_columns), blocks = input_blocks * parts_of(work.outputs, tile_columns);
  // All taps of a block by one thread, which has both maps' blocks in cache, unless there are few blocks.
  const int64_t parts = blocks >= 4 * workers ? 1 : 3 * blocks >= 4 * workers ? 3 : 9;

#pragma omp parallel num_threads(workers)
  {
#pragma omp for schedule(static) nowait
    for (int64_t row = 0; row <= packed.rows; ++row) pack_input_row(kernels, work, packed, row);
#pragma omp for schedule(static)
    for (int64_t tile = 0; tile < packed.tiles; ++tile) pack_gradient_tile(kernels, work, packed, tile);
    kernels.begin();
    // Blocks that follow each other share one of the input.
#pragma omp for schedule(dynamic)
    for (int64_t turn = 0; turn < blocks * parts; ++turn) {
      const int64_t block = turn / parts, taps = 9 / parts, first = turn % parts * taps;
      const int64_t of_outputs = block % (blocks / input_blocks), of_input = block / (blocks / input_blocks);
      sum_block(kernels, work, packed, of_outputs * tile_columns, of_input * tile_columns, first, first + taps);
    }
    kernels.end();
  }
}

}  // namespace ftfast
