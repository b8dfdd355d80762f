// The driver of the batch norm: shares rows between threads and finishes what belongs to a channel.
#include "batch_norm.h"

#include <cmath>
#include <cstring>
#include <vector>

#include "share.h"

namespace ftfast {
namespace {

// Sums are kept for this many blocks of rows, however many threads there are.
constexpr int64_t row_blocks = 32;

// Maps of few channels are walked as rows of several pixels, so that a row fills the registers.
constexpr int64_t wide_row = 64;

struct Rows {
  int64_t count, pixels, width, bytes;  // pixels of a row; its numbers and bytes

  Rows(int64_t rows, int64_t channels, DType dtype) : count(rows), pixels(1) {
    if (channels < wide_row && wide_row % channels == 0 && rows % (wide_row / channels) == 0)
      pixels = wide_row / channels;
    count = rows / pixels;
    width = channels * pixels;
    bytes = width * (dtype == DType::float32 ? 4 : 2);
  }

  // One number a channel, for every pixel of a row.
  std::vector<float> spread(const float* of_channels) const {
    const int64_t channels = width / pixels;
    std::vector<float> wide(static_cast<size_t>(width));
    for (int64_t p = 0; p < pixels; ++p) std::memcpy(&wide[p * channels], of_channels, channels * sizeof(float));
    return wide;
  }

  // body(first, rows of the block, sums of the block); total is called with each channel's two sums.
  template <class Body, class Total>
  void sum(int64_t maps_read, int threads, Body body, Total total) const {
    std::vector<float> sums(static_cast<size_t>(2 * row_blocks * width));
    each_block(maps_read, threads, [&](int64_t block, int64_t first, int64_t rows) {
      body(first, rows, &sums[2 * block * width], &sums[(2 * block + 1) * width]);
    });
    const int64_t channels = width / pixels;
    for (int64_t c = 0; c < channels; ++c) {
      double of_sums = 0, of_products = 0;
      for (int64_t block = 0; block < row_blocks; ++block)
        for (int64_t p = 0; p < pixels; ++p) {
          of_sums += sums[2 * block * width + p * channels + c];
          of_products += sums[(2 * block + 1) * width + p * channels + c];
        }
      total(c, of_sums, of_products);
    }
  }

  template <class Body>
  void each_block(int64_t maps, int threads, Body body) const {
    share(row_blocks, maps * count * bytes, threads, [&](int64_t block) {
      const int64_t first = count * block / row_blocks, last = count * (block + 1) / row_blocks;
      if (last > first) body(block, first, last - first);
    });
  }

  const char* at(const void* map, int64_t row) const { return map ? static_cast<const char*>(map) + row * bytes : nullptr; }
  char* at(void* map, int64_t row) const { return map ? static_cast<char*>(map) + row * bytes : nullptr; }
};

float first_number(const void* map, int64_t c, DType dtype) {
  return dtype == DType::float32 ? static_cast<const float*>(map)[c] : to_float(static_cast<const BFloat16*>(map)[c]);
}

// The whole as scale and offset; backward rounds them as forward did, so that the same numbers pass the ReLU.
struct Affine {
  std::vector<float> scale, offset;

  explicit Affine(int64_t channels) : scale(static_cast<size_t>(channels)), offset(scale) {}

  void set(int64_t c, float weight, float bias, float mean, float inverse_deviation) {
    const double factor = double(weight) * inverse_deviation;
    scale[c] = float(factor);
    offset[c] = float(bias - mean * factor);
  }
};

}  // namespace

void batch_norm_forward(const NormForward& work) {
  const NormKernels kernels = norm_kernels(work.dtype);
  const Rows rows(work.rows, work.channels, work.dtype);
  const int64_t channels = work.channels;
  Affine affine(channels);
  std::vector<float> shift(static_cast<size_t>(channels));
  for (int64_t c = 0; c < channels; ++c) shift[c] = first_number(work.z, c, work.dtype);
  const auto shifts = rows.spread(shift.data());
  const double count = double(work.rows);
  rows.sum(
      1, work.threads,
      [&](int64_t first, int64_t n, float* sums, float* squares) {
        kernels.statistics(rows.at(work.z, first), n, rows.width, shifts.data(), sums, squares);
      },
      [&](int64_t c, double sum, double squares) {
        const double from_shift = sum / count, mean = from_shift + shift[c];
        const double variance = std::fmax(squares / count - from_shift * from_shift, 0.0);
        work.mean[c] = float(mean);
        work.inverse_deviation[c] = float(1 / std::sqrt(variance + work.eps));
        affine.set(c, work.weight[c], work.bias[c], work.mean[c], work.inverse_deviation[c]);
        const double unbiased = variance * count / (count - 1);
        work.running_mean[c] = float((1 - work.momentum) * work.running_mean[c] + work.momentum * mean);
        work.running_variance[c] = float((1 - work.momentum) * work.running_variance[c] + work.momentum * unbiased);
      });
  const auto scales = rows.spread(affine.scale.data()), offsets = rows.spread(affine.offset.data());
  rows.each_block(work.residual ? 3 : 2, work.threads, [&](int64_t, int64_t first, int64_t n) {
    kernels.normalise(rows.at(work.z, first), rows.at(work.residual, first), rows.at(work.y, first), n, rows.width,
                      scales.data(), offsets.data(), work.relu);
  });
}

void batch_norm_backward(const NormBackward& work) {
  const NormKernels kernels = norm_kernels(work.dtype);
  const Rows rows(work.rows, work.channels, work.dtype);
  const int64_t channels = work.channels;
  Affine affine(channels);
  for (int64_t c = 0; c < channels; ++c)
    affine.set(c, work.weight[c], work.bias[c], work.mean[c], work.inverse_deviation[c]);
  const auto scales = rows.spread(affine.scale.data()), offsets = rows.spread(affine.offset.data());
  const auto means = rows.spread(work.mean);
  std::vector<float> slope(static_cast<size_t>(channels)), constant(slope);
  rows.sum(
      2 + (work.y != nullptr) + (work.residual_gradient != nullptr), work.threads,
      [&](int64_t first, int64_t n, float* sums, float* products) {
        kernels.gradient_sums(rows.at(work.gradient, first), rows.at(work.y, first), rows.at(work.z, first),
                              rows.at(work.residual_gradient, first), n, rows.width, scales.data(), offsets.data(),
                              means.data(), work.relu, sums, products);
      },
      [&](int64_t c, double sum, double product) {
        const double inverse = work.inverse_deviation[c], count = double(work.rows);
        work.bias_gradient[c] = float(sum);
        work.weight_gradient[c] = float(product * inverse);
        slope[c] = float(-affine.scale[c] * product * inverse * inverse / count);
        constant[c] = float(-affine.scale[c] * sum / count);
      });
  const auto slopes = rows.spread(slope.data()), constants = rows.spread(constant.data());
  // Past the ReLU already where the residual's gradient was written.
  const bool is_masked = work.residual_gradient != nullptr;
  const void* gradient = is_masked ? work.residual_gradient : work.gradient;
  rows.each_block(3, work.threads, [&](int64_t, int64_t first, int64_t n) {
    kernels.input_gradient(rows.at(gradient, first), rows.at(work.z, first), rows.at(work.z_gradient, first), n,
                           rows.width, scales.data(), offsets.data(), means.data(), slopes.data(), constants.data(),
                           work.relu && !is_masked);
  });
}

}  // namespace ftfast
