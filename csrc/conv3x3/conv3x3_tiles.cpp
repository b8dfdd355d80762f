// The driver of the convolution on matrix tiles: packs weights, and shares bands of rows between threads.
#include "conv3x3_tiles.h"

#include <algorithm>

#include "scratch.h"
#include "share.h"

namespace ftfast {
namespace {

// Of a band's cells: half of a core's second cache, of which the weight of a block of outputs takes its part. All blocks
// of outputs pass over a band while it is there.
constexpr int64_t band_bytes = 1 << 20;

// A band of fewer cells would be copied and its weight fetched for few products.
constexpr int64_t band_cells = 64;

// Multiplications that are worth a second thread: waking one costs microseconds.
constexpr int64_t products_per_thread = 1 << 22;

constexpr int64_t parts_of(int64_t whole, int64_t part) { return (whole + part - 1) / part; }

void convolve_band(const TileKernels& kernels, const DirectConvolution& work, int64_t first, int64_t last,
                   int64_t first_block, int64_t last_block, uint16_t* cells) {
  kernels.pack_rows(work, first, last, cells);
  for (int64_t block = first_block; block < last_block; ++block) {
    const int64_t k = block * tile_columns;
    DirectConvolution turn = work;
    turn.weight += k * 9 * whole(work.channels, tile_columns);
    turn.bias = work.bias ? work.bias + k : nullptr;
    turn.residual = work.residual ? work.residual + k : nullptr;
    turn.result += k;
    (work.outputs - k < tile_columns ? kernels.rows16 : kernels.rows32)(turn, first, last, cells);
  }
}

}  // namespace

void conv3x3_tiles(const DirectConvolution& work) {
  if (!work.samples) return;
  const TileKernels kernels = tile_kernels();
  const int64_t rows = work.samples * work.height, row_cells = work.width + 1;
  const int64_t row_bytes = row_cells * cell_size(work.channels) * int64_t(sizeof(uint16_t));
  const int64_t blocks = parts_of(work.outputs, tile_columns);
  const int64_t products = rows * row_cells * 9 * work.channels * work.outputs;
  const int64_t threads = std::max<int64_t>(1, std::min<int64_t>(work.threads, products / products_per_thread));
  // As many bands as threads or a multiple of it, as long as there are cells enough; what is then left of the threads
  // shares the outputs of a band.
  int64_t bands = parts_of(parts_of(rows * row_bytes, band_bytes), threads) * threads;
  bands = std::max<int64_t>(1, std::min({bands, rows, rows * row_cells / band_cells}));
  const int64_t parts = std::min(blocks, parts_of(threads, bands));
  const int workers = int(std::min(threads, bands * parts));

  int64_t largest = 0;
  for (int64_t band = 0; band < bands; ++band) {
    const int64_t cells = cells_between(rows * band / bands, rows * (band + 1) / bands, work.height, work.width);
    largest = std::max(largest, cells_read(cells, work.width) * cell_size(work.channels));
  }
  const int64_t bytes = workers * largest * int64_t(sizeof(uint16_t));
  thread_local Scratch kept;
  Scratch passing;
  const bool keeps = bytes <= std::max(bytes_kept, 2 * workers * band_bytes);
  uint16_t* const memory = static_cast<uint16_t*>((keeps ? kept : passing).of_size(bytes));

#pragma omp parallel for num_threads(workers) schedule(static)
  for (int worker = 0; worker < workers; ++worker) {
    const int64_t from = bands * parts * worker / workers, to = bands * parts * (worker + 1) / workers;
    kernels.begin();
    for (int64_t turn = from; turn < to; ++turn) {
      const int64_t band = turn / parts, part = turn % parts;
      convolve_band(kernels, work, rows * band / bands, rows * (band + 1) / bands, blocks * part / parts,
                    blocks * (part + 1) / parts, memory + worker * largest);
    }
    kernels.end();
  }
}

void pack_tiles_weight(const float* from, const int64_t strides[4], int64_t outputs, int64_t channels,
                       bool for_gradient, uint16_t* to, int threads) {
  const TileKernels kernels = tile_kernels();
  const int64_t rows = for_gradient ? channels : outputs, inner = for_gradient ? outputs : channels;
  const int64_t row_stride = strides[for_gradient ? 1 : 0], inner_stride = strides[for_gradient ? 0 : 1];
  const int64_t blocks = parts_of(rows, tile_columns), steps = parts_of(inner, tile_columns);
  share(blocks * steps, 9 * outputs * channels * int64_t(sizeof *from), threads, [&](int64_t turn) {
    const int64_t row = turn / steps * tile_columns, of_inner = turn % steps * tile_columns;
    const int64_t rows_here = std::min(tile_columns, rows - row);
    uint16_t* const packed = to + 9 * (row * steps * tile_columns + rows_here * of_inner);
    kernels.pack_weight(from + row * row_stride + of_inner * inner_stride, row_stride, inner_stride, strides + 2,
                        rows_here, std::min(tile_columns, inner - of_inner), for_gradient, packed);
  });
}

}  // namespace ftfast
