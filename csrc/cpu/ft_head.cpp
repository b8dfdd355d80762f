// Rows of the head's maps and weights; compiled once for each instruction set.

#include "ft_head.h"
#include "vector.h"

namespace ftfast {
namespace FTFAST_INSTRUCTION_SET {
namespace {

constexpr int taps = 9;

template <class T>
T from_float(float value);
template <>
float from_float<float>(float value) { return value; }
template <>
BFloat16 from_float<BFloat16>(float value) { return to_bfloat16(value); }

float as_float(float value) { return value; }
float as_float(BFloat16 value) { return to_float(value); }

// Columns c to c + width * float_lanes of every row.
template <int width, class T>
void leaky_relu_backward_columns(T* gradient, const T* output, int64_t rows, int64_t channels, int64_t c, float slope,
                                 float* sums) {
  const Floats zero = {}, slopes = zero + slope, ones = zero + 1.0f;
  Floats added[width] = {};
  for (int64_t r = 0; r < rows; ++r) {
    T* at = gradient + r * channels + c;
    for (int u = 0; u < width; ++u) {
      Floats values = load(at + u * float_lanes);
      if (output) {
        const Floats y = load(output + r * channels + c + u * float_lanes);
        values = values * (y > zero ? ones : slopes);
        store(at + u * float_lanes, values);
      }
      added[u] += values;
    }
  }
  if (sums)
    for (int u = 0; u < width; ++u) store(sums + c + u * float_lanes, load(sums + c + u * float_lanes) + added[u]);
}

template <class T>
void leaky_relu_backward(void* gradient_bytes, const void* output_bytes, int64_t rows, int64_t channels, float slope,
                         float* sums) {
  T* gradient = static_cast<T*>(gradient_bytes);
  const T* output = static_cast<const T*>(output_bytes);
  int64_t c = 0;
  for (; c + 4 * float_lanes <= channels; c += 4 * float_lanes)
    leaky_relu_backward_columns<4>(gradient, output, rows, channels, c, slope, sums);
  for (; c + float_lanes <= channels; c += float_lanes)
    leaky_relu_backward_columns<1>(gradient, output, rows, channels, c, slope, sums);
  for (; c < channels; ++c) {
    float added = 0;
    for (int64_t r = 0; r < rows; ++r) {
      T* at = gradient + r * channels + c;
      float value = as_float(*at);
      if (output) {
        value *= as_float(output[r * channels + c]) > 0 ? 1.0f : slope;
        *at = from_float<T>(value);
      }
      added += value;
    }
    if (sums) sums[c] += added;
  }
}

template <class T>
void taps_first(const float* from, void* to_bytes, int64_t channels) {
  T* to = static_cast<T*>(to_bytes);
  for (int tap = 0; tap < taps; ++tap)
    for (int64_t c = 0; c < channels; ++c) to[tap * channels + c] = from_float<T>(from[c * taps + tap]);
}

template <class T>
void taps_last(const void* from_bytes, float* to, int64_t channels, float scale) {
  const T* from = static_cast<const T*>(from_bytes);
  for (int64_t c = 0; c < channels; ++c)
    for (int tap = 0; tap < taps; ++tap) to[c * taps + tap] = as_float(from[tap * channels + c]) * scale;
}

template <class T>
HeadKernels kernels() {
  return {leaky_relu_backward<T>, taps_first<T>, taps_last<T>};
}

}  // namespace

HeadKernels head_kernels(DType dtype) {
  switch (dtype) {
    case DType::float32: return kernels<float>();
    case DType::bfloat16: return kernels<BFloat16>();
    case DType::float64: case DType::float16: case DType::int8: case DType::float8_e4m3fn: break;
  }
  return {};
}

}  // namespace FTFAST_INSTRUCTION_SET
}  // namespace ftfast
