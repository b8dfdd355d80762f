// The 3x3 convolution of bfloat16 maps and its weight gradient on Intel's matrix tiles (AMX): what the drivers
// (conv3x3_tiles.cpp, conv3x3_tiles_gradient.cpp) and the kernels (cpu_amx/) share. Maps are [N, H, W, C], channels
// innermost, their channels multiples of 16.
//
// For the tiles each pixel is copied into a cell. A row of a map is W + 1 cells, the first of them empty, and an empty
// row stands before every sample and after the last. So a shift by a tap is the same distance in cells for every pixel,
// wherever it lies, and a tile's 16 rows are 16 cells in a row. What is computed for empty cells is thrown away.
#pragma once

#include <cstdint>

#include "conv3x3.h"
#include "conv3x3_direct.h"

namespace ftfast {

// Rows of a tile; a row is 64 bytes.
constexpr int64_t tile_rows = 16;
// Numbers of bfloat16 in a tile's row: the channels that one instruction sums over, and the outputs of two tiles.
constexpr int64_t tile_columns = 32;

static inline int64_t whole(int64_t count, int64_t unit) { return (count + unit - 1) / unit * unit; }

// Tiles whose rows lie a power of two of cache lines apart share few cache sets: cells are an odd number of lines.
static inline int64_t cell_size(int64_t channels) {
  return (((channels + tile_columns - 1) / tile_columns) | 1) * tile_columns;
}

// Where one of all N * H rows stands among the rows of cells, the empty ones included.
static inline int64_t row_of_cells(int64_t row, int64_t height) { return row + row / height + 1; }

// Cells from the first pixel of rows first to last - 1 to the last pixel, these included.
static inline int64_t cells_between(int64_t first, int64_t last, int64_t height, int64_t width) {
  return (row_of_cells(last - 1, height) - row_of_cells(first, height) + 1) * (width + 1) - 1;
}

// All that tiles read for so many cells: their neighbours, and whole tiles.
static inline int64_t cells_read(int64_t cells, int64_t width) {
  return whole(cells, tile_rows) + 2 * (width + 1) + 2;
}

// The weight is packed [blocks of 32 outputs, blocks of 32 channels, ky, kx, halves of the outputs, pairs of channels,
// outputs of a half, 2]: in the order in which tiles are read. The last block of outputs may be a half alone; missing
// channels are zeros.
struct TileKernels {
  // The calling thread's tiles are set up, and given back.
  void (*begin)();
  void (*end)();
  // from: one block of 32 outputs and 32 channels, or a half of either. steps: from a number to the next, of taps ky
  // and kx. flipped: taps.
  void (*pack_weight)(const float* from, int64_t output_step, int64_t channel_step, const int64_t tap_steps[2],
                      int64_t outputs, int64_t channels, bool flipped, uint16_t* to);
  // Rows first to last - 1 of all N * H as cells, with the rows around them.
  void (*pack_rows)(const DirectConvolution& work, int64_t first, int64_t last, uint16_t* cells);
  // The same rows of 16 or 32 output channels. Pointers are at the map's first number, those of weight, bias, residual
  // and result at the first of these channels.
  void (*rows16)(const DirectConvolution& work, int64_t first, int64_t last, const uint16_t* cells);
  void (*rows32)(const DirectConvolution& work, int64_t first, int64_t last, const uint16_t* cells);
};

// As in conv3x3.h a word is the same pixel of two samples. The input's cells are uint32_t [blocks of 16 channels,
// cells, 16 channels], those of the result's gradient [blocks of 16 outputs, tiles, 16 outputs, 16 cells], from the
// first pixel on.
struct TileGradientKernels {
  void (*begin)();
  void (*end)();
  // An empty cell, the pixels of one row of one pair of samples, and more empty cells. second is null where the last
  // sample is alone. stride: from a block of channels to the next.
  void (*pack_input)(const uint16_t* first, const uint16_t* second, uint32_t* to, int64_t pixels, int64_t empty,
                     int64_t channels, int64_t stride);
  // One tile of every block of outputs; null where a cell is empty. stride: from a block of outputs to the next.
  void (*pack_gradient)(const uint16_t* const first[tile_rows], const uint16_t* const second[tile_rows], uint32_t* to,
                        int64_t channels, int64_t stride);
  // sums[k, c], [32, 32], of one tap over so many tiles of one or two blocks of either map; to what is there unless
  // they are the first.
  void (*add)(const uint32_t* input, int64_t input_stride, int64_t input_blocks, const uint32_t* gradient,
              int64_t gradient_stride, int64_t gradient_blocks, int64_t tiles, bool first, float* sums);
};

// All null where the compiler has no AMX, FTFAST_INSTRUCTION_SET asks for less, or why_no_tiles() has a reason.
TileKernels tile_kernels();
TileGradientKernels tile_gradient_kernels();

// Each number is summed by one thread in one order, so the number of threads does not change a bit.
void conv3x3_tiles(const DirectConvolution& work);
void conv3x3_tiles_weight_gradient(const WeightGradient& work);

// As pack_direct_weight in conv3x3_direct.h; to has the summed channels filled up to a multiple of 32.
void pack_tiles_weight(const float* from, const int64_t strides[4], int64_t outputs, int64_t channels,
                       bool for_gradient, uint16_t* to, int threads);

}  // namespace ftfast
