// A 3x3 convolution of bfloat16 maps on the CPU, stride 1, padding 1, with what follows it:
//
//   y = leaky_relu(conv(x) + bias + residual)
//
// Maps are [N, H, W, C], channels innermost. Bias, residual and activation are optional. The gradient of a
// convolution's input is the same with its weight transposed and flipped.
#pragma once

#include <cstdint>

namespace ftfast {

// Output channels of a register; channels are multiples of it.
constexpr int64_t direct_block = 16;

// The processor adds up products of two pairs of numbers at once; a pair is two input channels. The weight is packed
// [blocks of outputs, ky, pairs of channels, kx, outputs of a block, 2].
struct DirectConvolution {
  const uint16_t* input = nullptr;     // [N, H, W, C]
  const uint16_t* weight = nullptr;    // packed
  const float* bias = nullptr;         // [K], or null
  const uint16_t* residual = nullptr;  // [N, H, W, K], or null
  uint16_t* result = nullptr;          // [N, H, W, K]
  int64_t samples = 0, height = 0, width = 0, channels = 0, outputs = 0;
  float negative_slope = 1;  // 0 for a ReLU, 1 for none
  int threads = 1;
};

struct DirectKernels {
  // Rows first to last of one sample for 16 or 32 output channels; pointers are at the sample's first number, those of
  // weight, bias, residual and result at the first of these channels.
  void (*rows16)(const DirectConvolution& work, int64_t first, int64_t last);
  void (*rows32)(const DirectConvolution& work, int64_t first, int64_t last);
};

// All null where the compiler or the processor has no AVX512-BF16, or FTFAST_INSTRUCTION_SET asks for less.
DirectKernels direct_kernels();

// Each number is summed by one thread in one order, so the number of threads does not change a bit.
void conv3x3_direct(const DirectConvolution& work);

// from: float [K, C, 3, 3] with these strides, rounded to bfloat16. For the gradient, to is packed for a convolution
// from K to C channels with flipped taps.
void pack_direct_weight(const float* from, const int64_t strides[4], int64_t outputs, int64_t channels,
                        bool for_gradient, uint16_t* to, int threads);

}  // namespace ftfast
