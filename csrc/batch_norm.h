// Batch normalisation of a training step with what follows it, on the CPU:
//
//   y = relu((z - mean) / sqrt(variance + eps) * weight + bias + residual)
//
// over [rows, channels], channels innermost: a map [N, H, W, C] has N * H * W rows. Residual and ReLU are optional.
// Ioffe, Szegedy, "Batch Normalization", ICML 2015.
#pragma once

#include <cstdint>

#include "dtype.h"
#include "ft_loss.h"

namespace ftfast {

struct NormForward {
  const void* z = nullptr;         // [rows, channels]
  const void* residual = nullptr;  // the same, or null
  void* y = nullptr;               // the same
  const float* weight = nullptr;   // [channels], as are all below
  const float* bias = nullptr;
  float* running_mean = nullptr;   // moved towards the batch's
  float* running_variance = nullptr;
  float* mean = nullptr;           // of the batch, for backward
  float* inverse_deviation = nullptr;
  DType dtype = DType::float32;
  int64_t rows = 0, channels = 0;
  double eps = 0, momentum = 0;
  bool relu = false;
  int threads = 1;
};

struct NormBackward {
  const void* gradient = nullptr;  // of y, [rows, channels]
  const void* y = nullptr;         // where there is a ReLU behind a residual: its sign decides, else z's does
  const void* z = nullptr;
  void* residual_gradient = nullptr;  // or null
  void* z_gradient = nullptr;
  const float* weight = nullptr;
  const float* bias = nullptr;
  const float* mean = nullptr;
  const float* inverse_deviation = nullptr;
  float* weight_gradient = nullptr;
  float* bias_gradient = nullptr;
  DType dtype = DType::float32;
  int64_t rows = 0, channels = 0;
  bool relu = false;
  int threads = 1;
};

// Sums are added up in an order that does not depend on the number of threads.
void batch_norm_forward(const NormForward& work);
void batch_norm_backward(const NormBackward& work);

// Some rows of the above. Arrays of one number a channel; sums are added to.
struct NormKernels {
  // sums += z - shift, squares += (z - shift)^2; a shift near the mean keeps their difference exact.
  void (*statistics)(const void* z, int64_t rows, int64_t channels, const float* shift, float* sums, float* squares);
  // y = z * scale + offset + residual, at least 0 with relu; residual may be null.
  void (*normalise)(const void* z, const void* residual, void* y, int64_t rows, int64_t channels, const float* scale,
                    const float* offset, bool relu);
  // g = gradient where its number passed the ReLU, else 0; sums += g, products += g * (z - mean). Whether it passed
  // says y, or z * scale + offset where y is null. g is written to masked unless that is null.
  void (*gradient_sums)(const void* gradient, const void* y, const void* z, void* masked, int64_t rows,
                        int64_t channels, const float* scale, const float* offset, const float* mean, bool relu,
                        float* sums, float* products);
  // z_gradient = g * scale + (z - mean) * slope + constant, with g from gradient as above, or as it is without relu.
  void (*input_gradient)(const void* gradient, const void* z, void* z_gradient, int64_t rows, int64_t channels,
                         const float* scale, const float* offset, const float* mean, const float* slope,
                         const float* constant, bool relu);
};

// Throws std::logic_error for a dtype other than float32 and bfloat16.
NormKernels norm_kernels(DType dtype);

}  // namespace ftfast
