// The weight gradient of a 3x3 convolution of bfloat16 maps on the CPU: what its driver (conv3x3.cpp) and its kernels
// (cpu_bf16/conv3x3.cpp) share. Maps are [N, H, W, C], channels innermost.
#pragma once

#include <cstdint>

namespace ftfast {

// Channels of the input and of the result's gradient that a tile of the weight gradient spans.
constexpr int64_t input_block = 16, output_block = 8;

// The processor adds up products of two pairs of numbers at once. So that a shift by a pixel breaks no pair, a pair is
// the same pixel of two samples: a packed map is uint32_t [blocks of channels, pairs of samples, H * W, channels of a
// block], the first sample's number in the low half, zeros for the missing sample and channels.
struct WeightGradientKernels {
  // One pair of samples, each [pixels, channels]; second is null where the last sample is alone. stride: from a block's
  // pixels of this pair to the next block's.
  void (*pack_input)(const uint16_t* first, const uint16_t* second, uint32_t* to, int64_t pixels, int64_t channels,
                     int64_t stride);
  void (*pack_gradient)(const uint16_t* first, const uint16_t* second, uint32_t* to, int64_t pixels, int64_t channels,
                        int64_t stride);
  // One block of the input's channels against one of the gradient's, over all pairs: sums[ky, k, kx, c], overwritten.
  void (*tile)(const uint32_t* input, const uint32_t* gradient, float* sums, int64_t pairs, int64_t height,
               int64_t width);
  // to[c, ky, kx] = sums[ky, 0, kx, c]
  void (*taps_last)(const float* sums, float* to);
};

// All null where the compiler or the processor has no AVX512-BF16, or FTFAST_INSTRUCTION_SET asks for less.
WeightGradientKernels weight_gradient_kernels();

struct WeightGradient {
  const uint16_t* input = nullptr;     // [N, H, W, C]
  const uint16_t* gradient = nullptr;  // [N, H, W, K], of the convolution's result
  float* result = nullptr;             // [K, C, 3, 3]
  int64_t strides[4] = {};             // of the result, in elements
  int64_t samples = 0, height = 0, width = 0, channels = 0, outputs = 0;
  int threads = 1;
};

// Every element is summed by one thread over the samples in order, so the number of threads does not change a bit.
void conv3x3_weight_gradient(const WeightGradient& work);

}  // namespace ftfast
