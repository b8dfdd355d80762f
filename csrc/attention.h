// Attention maps on the CPU: m[n, i] = mean over channels of f[n, :, i]^e, and the gradient of f.
// Zagoruyko and Komodakis, "Paying More Attention to Attention", ICLR 2017.
#pragma once

#include <cstdint>

#include "ft_loss.h"

namespace ftfast {

constexpr int largest_exponent = 4;
// Pixels whose sums stay in the first cache while all channels are added to them.
constexpr int64_t pixels_at_once = 2048;

// Features are [N, C, H * W], or [N, H * W, C] with channels_last; maps are float [N, H * W].
struct AttentionMap {
  const void* features = nullptr;
  const float* upstream = nullptr;  // of the map, for the gradient
  void* result = nullptr;           // the map, or the features' gradient in their dtype and layout
  DType dtype = DType::float32;
  int64_t samples = 0, channels = 0, pixels = 0;
  bool channels_last = false;
  int exponent = 2;  // 1 to largest_exponent
  bool past_caches = false;  // the gradient is too large to stay in cache until somebody reads it
  int threads = 1;
};

// Each sum is one thread's, in one order, so the number of threads does not change a bit.
void attention_map(const AttentionMap& work);
// result = upstream * e / C * f^(e - 1), rounded once
void attention_gradient(const AttentionMap& work);

// The mean over samples and pixels of |q_s - q_t|^p, q being a map over its norm, and the gradient of the student's
// features: one sample after the other, so that the features are read for the gradient while they are in cache.
struct AttentionDifference {
  AttentionMap student;               // result: the gradient, or null where it is not wanted
  const float* teacher_map = nullptr;  // [N, H * W]
  int p = 1;                          // 1 or 2
  double eps = 0;                     // the floor of a norm
  double upstream = 1;                // what the gradient is written for
};
float attention_difference(const AttentionDifference& work);

// A part of one sample, whose first number the pointers are at. Of the map: some pixels, at most pixels_at_once. Of the
// gradient: some rows as they lie in memory, channels of [C, H * W] and pixels of [H * W, C].
struct AttentionKernels {
  void (*map)(const AttentionMap& work, int64_t first, int64_t last);
  void (*gradient)(const AttentionMap& work, int64_t first, int64_t last);
};

// Throws std::logic_error for a dtype other than float32, bfloat16 and float16.
AttentionKernels attention_kernels(DType dtype, bool channels_last, int exponent);

}  // namespace ftfast
