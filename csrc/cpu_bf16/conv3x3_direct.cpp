// Rows of a direct 3x3 convolution with AVX512-BF16's dot products; compiled where the compiler has them.
//
// A pair of input channels, once broadcast, is multiplied with the weights of all three taps of its row and added to
// three neighbouring results: one load for three products, and for six where two blocks of outputs go together.
#include "conv3x3/conv3x3_direct.h"

#include <immintrin.h>

#include <array>
#include <cstring>
#include <utility>

namespace ftfast {
namespace avx512_bf16 {
namespace {

// Of the 32 vector registers, 16 hold results: this many pixels of a row times blocks of outputs.
constexpr int results_at_once = 16;

inline __m512 load_bf16(const uint16_t* from) {
  const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}

template <int pixels, int blocks>
using Sums = __m512[blocks][pixels];

// The input's pixel `at` of a run of results, from one left of it to one right of it.
template <int at, int pixels, int blocks>
inline __attribute__((always_inline)) void add_pixel(Sums<pixels, blocks>& sums, const __m512bh (&taps)[blocks][3],
                                                     const uint16_t* input, int64_t channels) {
  int32_t pair;
  std::memcpy(&pair, input + at * channels, sizeof pair);
  const __m512bh values = (__m512bh)_mm512_set1_epi32(pair);
#pragma GCC unroll 2
  for (int k = 0; k < blocks; ++k) {
    if constexpr (at > 0) sums[k][at - 1] = _mm512_dpbf16_ps(sums[k][at - 1], values, taps[k][2]);
    if constexpr (at >= 0 && at < pixels) sums[k][at] = _mm512_dpbf16_ps(sums[k][at], values, taps[k][1]);
    if constexpr (at < pixels - 1) sums[k][at + 1] = _mm512_dpbf16_ps(sums[k][at + 1], values, taps[k][0]);
  }
}

template <int pixels, int blocks, int... at>
inline __attribute__((always_inline)) void add_pixels(Sums<pixels, blocks>& sums, const __m512bh (&taps)[blocks][3],
                                                      const uint16_t* input, int64_t channels,
                                                      std::integer_sequence<int, at...>) {
  (add_pixel<at, pixels, blocks>(sums, taps, input, channels), ...);
}

// One run of a row's results, from column x; neighbours outside the map are left out rather than read as zeros.
template <int pixels, int blocks>
void run(const DirectConvolution& work, int64_t y, int64_t x) {
  const int64_t channels = work.channels, outputs = work.outputs, row = work.width * channels;
  const int64_t block_weights = 9 * channels * direct_block;
  const bool has_left = x > 0, has_right = x + pixels < work.width;
  Sums<pixels, blocks> sums;
#pragma GCC unroll 2
  for (int k = 0; k < blocks; ++k) {
    const __m512 bias = work.bias ? _mm512_loadu_ps(work.bias + k * direct_block) : _mm512_setzero_ps();
#pragma GCC unroll 16
    for (int i = 0; i < pixels; ++i) sums[k][i] = bias;
  }
  for (int64_t ky = y == 0 ? 1 : 0; ky < (y == work.height - 1 ? 2 : 3); ++ky) {
    const uint16_t* input = work.input + (y + ky - 1) * row + x * channels;
    const uint16_t* weight = work.weight + ky * channels * 3 * direct_block;
    for (int64_t c = 0; c < channels; c += 2, input += 2, weight += 3 * 2 * direct_block) {
      __m512bh taps[blocks][3];
#pragma GCC unroll 2
      for (int k = 0; k < blocks; ++k)
#pragma GCC unroll 3
        for (int kx = 0; kx < 3; ++kx)
          taps[k][kx] = (__m512bh)_mm512_loadu_si512(weight + k * block_weights + kx * 2 * direct_block);
      add_pixels<pixels, blocks>(sums, taps, input, channels, std::make_integer_sequence<int, pixels>());
      if (has_left) add_pixel<-1, pixels, blocks>(sums, taps, input, channels);
      if (has_right) add_pixel<pixels, pixels, blocks>(sums, taps, input, channels);
    }
  }
  const int64_t at = (y * work.width + x) * outputs;
  const __m512 slope = _mm512_set1_ps(work.negative_slope);
#pragma GCC unroll 16
  for (int i = 0; i < pixels; ++i)
#pragma GCC unroll 2
    for (int k = 0; k < blocks; ++k) {
      const int64_t to = at + i * outputs + k * direct_block;
      __m512 value = sums[k][i];
      if (work.residual) value = _mm512_add_ps(value, load_bf16(work.residual + to));
      const __mmask16 negative = _mm512_cmp_ps_mask(value, _mm512_setzero_ps(), _CMP_LT_OQ);
      value = _mm512_mask_mul_ps(value, negative, value, slope);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(work.result + to), (__m256i)_mm512_cvtneps_pbh(value));
    }
}

template <int blocks, int... lengths>
constexpr auto runs_of(std::integer_sequence<int, lengths...>) {
  return std::array<void (*)(const DirectConvolution&, int64_t, int64_t), sizeof...(lengths)>{
      run<lengths + 1, blocks>...};
}

// A row in runs of nearly equal length, each compiled for its own.
template <int blocks>
void rows(const DirectConvolution& work, int64_t first, int64_t last) {
  constexpr int longest = results_at_once / blocks;
  constexpr auto runs = runs_of<blocks>(std::make_integer_sequence<int, longest>());
  const int64_t count = (work.width + longest - 1) / longest;
  for (int64_t y = first; y < last; ++y)
    for (int64_t i = 0; i < count; ++i) {
      const int64_t x = work.width * i / count, end = work.width * (i + 1) / count;
      runs[size_t(end - x - 1)](work, y, x);
    }
}

}  // namespace

DirectKernels direct_kernels() { return {rows<1>, rows<2>}; }

}  // namespace avx512_bf16
}  // namespace ftfast
