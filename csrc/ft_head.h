// What the head does between oneDNN's convolutions on the CPU. Maps are [N, H, W, C], channels innermost.
// Kim, Park, Kwak, "Paraphrasing Complex Network: Network Compression via Factor Transfer", NeurIPS 2018.
#pragma once

#include <cstdint>

#include "ft_loss.h"

namespace ftfast {

struct HeadKernels {
  // gradient[r, c] *= output[r, c] > 0 ? 1 : slope, unless output is null; sums[c] += the column sums of what is then
  // in gradient, before rounding, unless sums is null. Both are [rows, channels].
  void (*leaky_relu_backward)(void* gradient, const void* output, int64_t rows, int64_t channels, float slope,
                              float* sums);
  // to[tap, c] = from[c, tap] for one output channel of a 3x3 weight: float to the kernels' dtype.
  void (*taps_first)(const float* from, void* to, int64_t channels);
  // to[c, tap] = from[tap, c] * scale, the way back.
  void (*taps_last)(const void* from, float* to, int64_t channels, float scale);
};

// Throws std::logic_error for a dtype other than float32 and bfloat16.
HeadKernels head_kernels(DType dtype);

// The driver; sums: [channels], overwritten, added up in an order that does not depend on the number of threads.
void leaky_relu_backward(void* gradient, const void* output, DType dtype, int64_t rows, int64_t channels, float slope,
                         float* sums, int threads);

// to: [N * H * W, 9 * C], row p holding the neighbourhood of pixel p, tap after tap, zeros outside the map.
void unfold_3x3(const void* from, void* to, int64_t element_bytes, int64_t samples, int64_t height, int64_t width,
                int64_t channels, int threads);

// from: float [K, C, 3, 3], to: dtype [K, 3, 3, C]
void weight_taps_first(const float* from, void* to, DType dtype, int64_t outputs, int64_t channels, int threads);
// from: dtype [K, 3, 3, C], to: float [K, C, 3, 3]
void weight_taps_last(const void* from, float* to, DType dtype, int64_t outputs, int64_t channels, float scale,
                      int threads);

}  // namespace ftfast
