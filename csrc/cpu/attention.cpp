// Pixels of attention maps; compiled once for each instruction set.
#include "attention.h"

#include <type_traits>

#include "vector.h"

namespace ftfast {
namespace FTFAST_INSTRUCTION_SET {
namespace {

template <class T>
float number(T value) {
  if constexpr (std::is_same_v<T, float>) return value;
  else return to_float(value);
}
template <class T>
T rounded(float value) {
  if constexpr (std::is_same_v<T, float>) return value;
  else if constexpr (std::is_same_v<T, BFloat16>) return to_bfloat16(value);
  else return to_float16(value);
}

template <int exponent, class V>
inline V power(V x) {
  if constexpr (exponent == 0) return V{} + 1;
  else if constexpr (exponent == 1) return x;
  else if constexpr (exponent == 2) return x * x;
  else if constexpr (exponent == 3) return x * x * x;
  else return (x * x) * (x * x);
}

// [C, pixels]: rows are added up one after another, so memory is read in its order. The last pixels of a row are a
// register of their own, which overlaps the one before.
template <class T, int exponent>
void map_of_rows(const AttentionMap& work, int64_t first, int64_t last) {
  const T* features = static_cast<const T*>(work.features);
  float* sums = static_cast<float*>(work.result);
  const int64_t row = work.pixels, whole = first + (last - first) / float_lanes * float_lanes;
  const bool overlaps = whole < last && last - first >= float_lanes;
  const int64_t end = overlaps ? last - float_lanes : last;
  Floats at_end = {};
  for (int64_t i = first; i < last; ++i) sums[i] = 0;
  int64_t c = 0;
  for (; c + 4 <= work.channels; c += 4) {
    const T* from = features + c * row;
    const auto four = [&](int64_t i) {
      if (work.past_caches)  // else the processor's own prefetching does
        for (int64_t k = 4; k < 8; ++k) __builtin_prefetch(from + k * row + i);
      const Floats pair = power<exponent>(load(from + i)) + power<exponent>(load(from + row + i));
      const Floats next = power<exponent>(load(from + 2 * row + i)) + power<exponent>(load(from + 3 * row + i));
      return pair + next;
    };
    for (int64_t i = first; i < whole; i += float_lanes) store(sums + i, load(sums + i) + four(i));
    if (overlaps) at_end += four(end);
    else
      for (int64_t i = whole; i < last; ++i)
        for (int64_t k = 0; k < 4; ++k) sums[i] += power<exponent>(number(from[k * row + i]));
  }
  for (; c < work.channels; ++c) {
    const T* from = features + c * row;
    for (int64_t i = first; i < whole; i += float_lanes)
      store(sums + i, load(sums + i) + power<exponent>(load(from + i)));
    if (overlaps) at_end += power<exponent>(load(from + end));
    else
      for (int64_t i = whole; i < last; ++i) sums[i] += power<exponent>(number(from[i]));
  }
  if (overlaps)
    for (int64_t i = whole; i < last; ++i) sums[i] = at_end[i - end];
  const float channels = float(work.channels);
  for (int64_t i = first; i < last; ++i) sums[i] /= channels;
}

// [pixels, C]
template <class T, int exponent>
void map_of_pixels(const AttentionMap& work, int64_t first, int64_t last) {
  const int64_t channels = work.channels;
  float* map = static_cast<float*>(work.result);
  for (int64_t i = first; i < last; ++i) {
    const T* from = static_cast<const T*>(work.features) + i * channels;
    Floats sums[4] = {};
    int64_t c = 0;
    for (; c + 4 * float_lanes <= channels; c += 4 * float_lanes)
      for (int u = 0; u < 4; ++u) sums[u] += power<exponent>(load(from + c + u * float_lanes));
    for (; c + float_lanes <= channels; c += float_lanes) sums[0] += power<exponent>(load(from + c));
    float total = sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
    for (; c < channels; ++c) total += power<exponent>(number(from[c]));
    map[i] = total / float(channels);
  }
}

// to[i] = from[i]^(exponent - 1) * upstream[i % period] * scale, in whole aligned registers but for the ends. Behind its
// period upstream goes on for a register from its beginning, or count ends there.
template <class T, int exponent, bool streaming>
void gradient_of_run(const T* from, T* to, int64_t count, const float* upstream, int64_t period, float scale) {
  int64_t i = 0, pixel = 0;
  const auto advance = [&](int64_t by) {
    pixel += by;
    if (pixel >= period) pixel -= period;
  };
  const auto one = [&] {
    to[i] = rounded<T>(power<exponent - 1>(number(from[i])) * (upstream[pixel] * scale));
    ++i;
    advance(1);
  };
  while (i < count && !streams_to(to + i)) one();
  const int64_t register_further = float_lanes % period;
  for (; i + float_lanes <= count; i += float_lanes) {
    put<streaming>(to + i, power<exponent - 1>(load(from + i)) * (load(upstream + pixel) * scale));
    advance(register_further);
  }
  while (i < count) one();
}

template <class T, int exponent>
void gradient_of_rows(const AttentionMap& work, int64_t first, int64_t last) {
  const float scale = float(exponent) / float(work.channels);
  const int64_t period = work.pixels, begin = first * period, count = (last - first) * period;
  const T* from = static_cast<const T*>(work.features) + begin;
  T* to = static_cast<T*>(work.result) + begin;
  const auto run = work.past_caches ? gradient_of_run<T, exponent, true> : gradient_of_run<T, exponent, false>;
  if (period <= pixels_at_once) {
    float upstream[pixels_at_once + float_lanes];
    std::memcpy(upstream, work.upstream, sizeof(float) * period);
    for (int64_t i = 0; i < float_lanes; ++i) upstream[period + i] = upstream[i];
    run(from, to, count, upstream, period, scale);
  } else {
    for (int64_t i = 0; i < count; i += period) run(from + i, to + i, period, work.upstream, period, scale);
  }
  if (work.past_caches) fence_streams();
}

template <class T, int exponent, bool streaming>
void gradient_of_pixels_by(const AttentionMap& work, int64_t first, int64_t last) {
  const int64_t channels = work.channels;
  const float scale = float(exponent) / float(channels);
  for (int64_t i = first; i < last; ++i) {
    const T* from = static_cast<const T*>(work.features) + i * channels;
    T* to = static_cast<T*>(work.result) + i * channels;
    const float factor = work.upstream[i] * scale;
    int64_t c = 0;
    for (; c + float_lanes <= channels; c += float_lanes)
      put<streaming>(to + c, power<exponent - 1>(load(from + c)) * factor);
    for (; c < channels; ++c) to[c] = rounded<T>(power<exponent - 1>(number(from[c])) * factor);
  }
  if (streaming) fence_streams();
}

template <class T, int exponent>
void gradient_of_pixels(const AttentionMap& work, int64_t first, int64_t last) {
  const bool aligned = work.channels % float_lanes == 0 && streams_to(static_cast<T*>(work.result));
  if (work.past_caches && aligned) gradient_of_pixels_by<T, exponent, true>(work, first, last);
  else gradient_of_pixels_by<T, exponent, false>(work, first, last);
}

template <class T, int exponent>
AttentionKernels kernels_of(bool channels_last) {
  if (channels_last) return {map_of_pixels<T, exponent>, gradient_of_pixels<T, exponent>};
  return {map_of_rows<T, exponent>, gradient_of_rows<T, exponent>};
}

template <class T>
AttentionKernels kernels_of(bool channels_last, int exponent) {
  switch (exponent) {
    case 1: return kernels_of<T, 1>(channels_last);
    case 2: return kernels_of<T, 2>(channels_last);
    case 3: return kernels_of<T, 3>(channels_last);
    case 4: return kernels_of<T, 4>(channels_last);
    default: return {};
  }
}

}  // namespace

AttentionKernels attention_kernels(DType dtype, bool channels_last, int exponent) {
  switch (dtype) {
    case DType::float32: return kernels_of<float>(channels_last, exponent);
    case DType::bfloat16: return kernels_of<BFloat16>(channels_last, exponent);
    case DType::float16: return kernels_of<Float16>(channels_last, exponent);
    case DType::float64: case DType::int8: case DType::float8_e4m3fn: break;
  }
  return {};
}

}  // namespace FTFAST_INSTRUCTION_SET
}  // namespace ftfast
