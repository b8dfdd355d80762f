// The driver of the weight gradient: packs both maps, then shares tiles of the result between threads.
#include "conv3x3.h"

#include <algorithm>

#include "scratch.h"

namespace ftfast {
namespace {

// Multiplications that are worth a second thread: waking one costs microseconds.
constexpr int64_t products_per_thread = 1 << 21;

constexpr int64_t blocks(int64_t channels, int64_t block) { return (channels + block - 1) / block; }

// Pairs of samples times pixels.
int64_t packed_pixels(const WeightGradient& work) { return (work.samples + 1) / 2 * work.height * work.width; }

void pack_pair(decltype(WeightGradientKernels::pack_input) pack, const uint16_t* map, uint32_t* to, int64_t pair,
               const WeightGradient& work, int64_t channels, int64_t block) {
  const int64_t pixels = work.height * work.width;
  const uint16_t* first = map + 2 * pair * pixels * channels;
  const bool alone = 2 * pair + 1 == work.samples;
  pack(first, alone ? nullptr : first + pixels * channels, to + pair * pixels * block, pixels, channels,
       packed_pixels(work) * block);
}

// A tile's sums to where the result has them.
void place(const WeightGradientKernels& kernels, const float* sums, const WeightGradient& work, int64_t first_output,
           int64_t first_channel) {
  const int64_t* strides = work.strides;
  const int64_t outputs = std::min(output_block, work.outputs - first_output);
  const int64_t channels = std::min(input_block, work.channels - first_channel);
  const bool dense = strides[1] == 9 && strides[2] == 3 && strides[3] == 1 && channels == input_block;
  for (int64_t k = 0; k < outputs; ++k) {
    const float* from = sums + k * 3 * input_block;
    float* to = work.result + (first_output + k) * strides[0] + first_channel * strides[1];
    if (dense) {
      kernels.taps_last(from, to);
      continue;
    }
    for (int64_t ky = 0; ky < 3; ++ky)
      for (int64_t kx = 0; kx < 3; ++kx)
        for (int64_t c = 0; c < channels; ++c)
          to[c * strides[1] + ky * strides[2] + kx * strides[3]] =
              from[(ky * output_block * 3 + kx) * input_block + c];
  }
}

}  // namespace

void conv3x3_weight_gradient(const WeightGradient& work) {
  const WeightGradientKernels kernels = weight_gradient_kernels();
  const int64_t pairs = (work.samples + 1) / 2, pixels = packed_pixels(work);
  const int64_t input_blocks = blocks(work.channels, input_block), output_blocks = blocks(work.outputs, output_block);
  const int64_t input_size = input_blocks * input_block * pixels, gradient_size = output_blocks * output_block * pixels;
  thread_local Scratch kept;
  Scratch passing;
  const int64_t bytes = (input_size + gradient_size) * int64_t(sizeof(uint32_t));
  uint32_t* const input = static_cast<uint32_t*>((bytes <= bytes_kept ? kept : passing).of_size(bytes));
  uint32_t* const gradient = input + input_size;
  const int64_t products = 2 * pixels * 9 * work.channels * work.outputs;
  const int workers = int(std::max<int64_t>(1, std::min<int64_t>(work.threads, products / products_per_thread)));
  (void)workers;

#pragma omp parallel num_threads(workers)
  {
#pragma omp for schedule(static)
    for (int64_t pair = 0; pair < pairs; ++pair) {
      pack_pair(kernels.pack_input, work.input, input, pair, work, work.channels, input_block);
      pack_pair(kernels.pack_gradient, work.gradient, gradient, pair, work, work.outputs, output_block);
    }
    // Tiles that follow each other share a block of the input, which stays in cache.
#pragma omp for schedule(dynamic)
    for (int64_t tile = 0; tile < input_blocks * output_blocks; ++tile) {
      const int64_t of_input = tile / output_blocks, of_output = tile % output_blocks;
      alignas(64) float sums[9 * output_block * input_block];
      kernels.tile(input + of_input * input_block * pixels, gradient + of_output * output_block * pixels, sums, pairs,
                   work.height, work.width);
      place(kernels, sums, work, of_output * output_block, of_input * input_block);
    }
  }
}

}  // namespace ftfast
