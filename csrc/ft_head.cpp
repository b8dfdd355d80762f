// The driver of the head's CPU kernels: shares rows, images and output channels between threads.
#include "ft_head.h"

#include <cstring>
#include <vector>

#include "share.h"

namespace ftfast {
namespace {

// Column sums are kept for this many blocks of rows, however many threads there are.
constexpr int64_t row_blocks = 16;

int64_t bytes_of(DType dtype) { return dtype == DType::float32 ? 4 : 2; }

}  // namespace

void leaky_relu_backward(void* gradient, const void* output, DType dtype, int64_t rows, int64_t channels, float slope,
                         float* sums, int threads) {
  const auto kernel = head_kernels(dtype).leaky_relu_backward;
  const int64_t row_bytes = channels * bytes_of(dtype);
  std::vector<float> partials(sums ? row_blocks * channels : 0);
  share(row_blocks, rows * row_bytes, threads, [&](int64_t block) {
    const int64_t first = rows * block / row_blocks, last = rows * (block + 1) / row_blocks;
    kernel(static_cast<char*>(gradient) + first * row_bytes,
           output ? static_cast<const char*>(output) + first * row_bytes : nullptr, last - first, channels, slope,
           sums ? partials.data() + block * channels : nullptr);
  });
  for (int64_t c = 0; sums && c < channels; ++c) {
    float total = 0;
    for (int64_t block = 0; block < row_blocks; ++block) total += partials[block * channels + c];
    sums[c] = total;
  }
}

void unfold_3x3(const void* from, void* to, int64_t element_bytes, int64_t samples, int64_t height, int64_t width,
                int64_t channels, int threads) {
  const int64_t pixel = channels * element_bytes, map = height * width * pixel;
  share(samples, samples * map * 9, threads, [&](int64_t n) {
    const char* source = static_cast<const char*>(from) + n * map;
    char* target = static_cast<char*>(to) + n * map * 9;
    for (int64_t y = 0; y < height; ++y)
      for (int64_t x = 0; x < width; ++x)
        for (int64_t tap = 0; tap < 9; ++tap, target += pixel) {
          const int64_t row = y + tap / 3 - 1, column = x + tap % 3 - 1;
          if (row < 0 || row >= height || column < 0 || column >= width) std::memset(target, 0, size_t(pixel));
          else std::memcpy(target, source + (row * width + column) * pixel, size_t(pixel));
        }
  });
}

void weight_taps_first(const float* from, void* to, DType dtype, int64_t outputs, int64_t channels, int threads) {
  const auto kernel = head_kernels(dtype).taps_first;
  const int64_t size = 9 * channels;
  share(outputs, outputs * size * 4, threads, [&](int64_t k) {
    kernel(from + k * size, static_cast<char*>(to) + k * size * bytes_of(dtype), channels);
  });
}

void weight_taps_last(const void* from, float* to, DType dtype, int64_t outputs, int64_t channels, float scale,
                      int threads) {
  const auto kernel = head_kernels(dtype).taps_last;
  const int64_t size = 9 * channels;
  share(outputs, outputs * size * 4, threads, [&](int64_t k) {
    kernel(static_cast<const char*>(from) + k * size * bytes_of(dtype), to + k * size, channels, scale);
  });
}

}  // namespace ftfast
