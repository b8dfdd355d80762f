// Rows of a batch norm and its gradient; compiled once for each instruction set.
#include "batch_norm.h"

#include <type_traits>

#include "vector.h"

namespace ftfast {
namespace FTFAST_INSTRUCTION_SET {
namespace {

// A register's worth of numbers or, at the end of a row, a single one: the same arithmetic for both. pass is a ReLU's
// way with x, NaN included, where its input was `by`.
struct Wide {
  using Values = Floats;
  static constexpr int64_t count = float_lanes;
  static Values pass(Values x, Values by) { return by <= Values{} ? Values{} : x; }
};
struct Single {
  using Values = float;
  static constexpr int64_t count = 1;
  static Values pass(Values x, Values by) { return by <= 0 ? 0 : x; }
};

template <class Step>
typename Step::Values read(const float* from) {
  if constexpr (Step::count == 1) return *from;
  else return load(from);
}
template <class Step>
typename Step::Values read(const BFloat16* from) {
  if constexpr (Step::count == 1) return to_float(*from);
  else return load(from);
}
template <class Step>
void write(float* to, typename Step::Values values) {
  if constexpr (Step::count == 1) *to = values;
  else store(to, values);
}
template <class Step>
void write(BFloat16* to, typename Step::Values values) {
  if constexpr (Step::count == 1) *to = to_bfloat16(values);
  else store(to, values);
}

// body(Step, width, c) for columns c to c + width * Step::count of every row, over all columns.
template <class Body>
void for_columns(int64_t channels, Body body) {
  int64_t c = 0;
  for (; c + 4 * float_lanes <= channels; c += 4 * float_lanes) body(Wide(), std::integral_constant<int, 4>(), c);
  for (; c + float_lanes <= channels; c += float_lanes) body(Wide(), std::integral_constant<int, 1>(), c);
  for (; c < channels; ++c) body(Single(), std::integral_constant<int, 1>(), c);
}

template <class T>
void statistics(const void* bytes, int64_t rows, int64_t channels, const float* shift, float* sums, float* squares) {
  for_columns(channels, [&](auto step, auto columns, int64_t c) {
    using Step = decltype(step);
    constexpr int width = decltype(columns)::value;
    typename Step::Values shifts[width], sum[width] = {}, square[width] = {};
    for (int u = 0; u < width; ++u) shifts[u] = read<Step>(shift + c + u * Step::count);
    const T* z = static_cast<const T*>(bytes) + c;
    for (int64_t r = 0; r < rows; ++r, z += channels)
#pragma GCC unroll 4
      for (int u = 0; u < width; ++u) {
        const auto value = read<Step>(z + u * Step::count) - shifts[u];
        sum[u] += value;
        square[u] = multiply_add(value, value, square[u]);
      }
    for (int u = 0; u < width; ++u) {
      const int64_t at = c + u * Step::count;
      write<Step>(sums + at, read<Step>(sums + at) + sum[u]);
      write<Step>(squares + at, read<Step>(squares + at) + square[u]);
    }
  });
}

template <class T, bool relu, bool has_residual>
void normalise_rows(const T* from, const T* residuals, T* to, int64_t rows, int64_t channels, const float* scale,
                    const float* offset) {
  for_columns(channels, [&](auto step, auto columns, int64_t c) {
    using Step = decltype(step);
    constexpr int width = decltype(columns)::value;
    typename Step::Values scales[width], offsets[width];
    for (int u = 0; u < width; ++u) {
      scales[u] = read<Step>(scale + c + u * Step::count);
      offsets[u] = read<Step>(offset + c + u * Step::count);
    }
    for (int64_t r = 0, at = c; r < rows; ++r, at += channels)
#pragma GCC unroll 4
      for (int u = 0; u < width; ++u) {
        const int64_t i = at + u * Step::count;
        auto value = multiply_add(read<Step>(from + i), scales[u], offsets[u]);
        if constexpr (has_residual) value += read<Step>(residuals + i);
        if constexpr (relu) value = Step::pass(value, value);
        write<Step>(to + i, value);
      }
  });
}

template <class T>
void normalise(const void* z, const void* residual, void* y, int64_t rows, int64_t channels, const float* scale,
               const float* offset, bool relu) {
  const auto run = relu ? (residual ? normalise_rows<T, true, true> : normalise_rows<T, true, false>)
                        : (residual ? normalise_rows<T, false, true> : normalise_rows<T, false, false>);
  run(static_cast<const T*>(z), static_cast<const T*>(residual), static_cast<T*>(y), rows, channels, scale, offset);
}

enum class Passed { always, by_y, by_z };  // which numbers' gradients pass the ReLU

template <class T, Passed passed, bool is_written>
void sum_rows(const T* gradient, const T* y, const T* z, T* masked, int64_t rows, int64_t channels, const float* scale,
              const float* offset, const float* mean, float* sums, float* products) {
  for_columns(channels, [&](auto step, auto columns, int64_t c) {
    using Step = decltype(step);
    constexpr int width = decltype(columns)::value;
    typename Step::Values scales[width], offsets[width], means[width], sum[width] = {}, product[width] = {};
    for (int u = 0; u < width; ++u) {
      scales[u] = read<Step>(scale + c + u * Step::count);
      offsets[u] = read<Step>(offset + c + u * Step::count);
      means[u] = read<Step>(mean + c + u * Step::count);
    }
    for (int64_t r = 0, at = c; r < rows; ++r, at += channels)
#pragma GCC unroll 4
      for (int u = 0; u < width; ++u) {
        const int64_t i = at + u * Step::count;
        const auto before = read<Step>(z + i);
        auto g = read<Step>(gradient + i);
        if constexpr (passed == Passed::by_y) g = Step::pass(g, read<Step>(y + i));
        if constexpr (passed == Passed::by_z) g = Step::pass(g, multiply_add(before, scales[u], offsets[u]));
        if constexpr (is_written) write<Step>(masked + i, g);
        sum[u] += g;
        product[u] = multiply_add(g, before - means[u], product[u]);
      }
    for (int u = 0; u < width; ++u) {
      const int64_t at = c + u * Step::count;
      write<Step>(sums + at, read<Step>(sums + at) + sum[u]);
      write<Step>(products + at, read<Step>(products + at) + product[u]);
    }
  });
}

template <class T>
void gradient_sums(const void* gradient, const void* y, const void* z, void* masked, int64_t rows, int64_t channels,
                   const float* scale, const float* offset, const float* mean, bool relu, float* sums,
                   float* products) {
  auto run = masked ? sum_rows<T, Passed::always, true> : sum_rows<T, Passed::always, false>;
  if (relu && y) run = masked ? sum_rows<T, Passed::by_y, true> : sum_rows<T, Passed::by_y, false>;
  if (relu && !y) run = masked ? sum_rows<T, Passed::by_z, true> : sum_rows<T, Passed::by_z, false>;
  run(static_cast<const T*>(gradient), static_cast<const T*>(y), static_cast<const T*>(z), static_cast<T*>(masked),
      rows, channels, scale, offset, mean, sums, products);
}

template <class T, bool relu>
void input_gradient_rows(const T* gradient, const T* z, T* to, int64_t rows, int64_t channels, const float* scale,
                         const float* offset, const float* mean, const float* slope, const float* constant) {
  for_columns(channels, [&](auto step, auto columns, int64_t c) {
    using Step = decltype(step);
    constexpr int width = decltype(columns)::value;
    typename Step::Values scales[width], offsets[width], means[width], slopes[width], constants[width];
    for (int u = 0; u < width; ++u) {
      const int64_t at = c + u * Step::count;
      scales[u] = read<Step>(scale + at);
      offsets[u] = read<Step>(offset + at);
      means[u] = read<Step>(mean + at);
      slopes[u] = read<Step>(slope + at);
      constants[u] = read<Step>(constant + at);
    }
    for (int64_t r = 0, at = c; r < rows; ++r, at += channels)
#pragma GCC unroll 4
      for (int u = 0; u < width; ++u) {
        const int64_t i = at + u * Step::count;
        const auto before = read<Step>(z + i);
        auto g = read<Step>(gradient + i);
        if constexpr (relu) g = Step::pass(g, multiply_add(before, scales[u], offsets[u]));
        write<Step>(to + i, multiply_add(g, scales[u], multiply_add(before - means[u], slopes[u], constants[u])));
      }
  });
}

template <class T>
void input_gradient(const void* gradient, const void* z, void* to, int64_t rows, int64_t channels, const float* scale,
                    const float* offset, const float* mean, const float* slope, const float* constant, bool relu) {
  const auto run = relu ? input_gradient_rows<T, true> : input_gradient_rows<T, false>;
  run(static_cast<const T*>(gradient), static_cast<const T*>(z), static_cast<T*>(to), rows, channels, scale, offset,
      mean, slope, constant);
}

template <class T>
NormKernels kernels() {
  return {statistics<T>, normalise<T>, gradient_sums<T>, input_gradient<T>};
}

}  // namespace

NormKernels norm_kernels(DType dtype) {
  switch (dtype) {
    case DType::float32: return kernels<float>();
    case DType::bfloat16: return kernels<BFloat16>();
    case DType::float64: case DType::float16: case DType::int8: case DType::float8_e4m3fn: break;
  }
  return {};
}

}  // namespace FTFAST_INSTRUCTION_SET
}  // namespace ftfast
