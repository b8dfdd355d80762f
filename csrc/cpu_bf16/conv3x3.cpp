// Tiles of a 3x3 convolution's weight gradient with AVX512-BF16's dot products; compiled where the compiler has them.
#include "conv3x3/conv3x3.h"

#include <immintrin.h>

#include <cstring>

namespace ftfast {
namespace avx512_bf16 {
namespace {

typedef uint16_t Halves __attribute__((vector_size(32)));
typedef uint32_t Words __attribute__((vector_size(64)));

inline Words load_channels(const uint16_t* from) {
  Halves halves;
  std::memcpy(&halves, from, sizeof halves);
  return __builtin_convertvector(halves, Words);
}

// Fewer than 16 channels, then zeros.
inline Words load_channels(const uint16_t* from, int64_t count) {
  uint16_t filled[16] = {};
  std::memcpy(filled, from, size_t(count) * sizeof *filled);
  return load_channels(filled);
}

template <int64_t block>
inline void store_channels(Words pairs, uint32_t* to, int64_t stride, int64_t count) {
  if constexpr (block == 16) {
    std::memcpy(to, &pairs, sizeof pairs);
  } else {
    static_assert(block == 8);
    const auto low = __builtin_shufflevector(pairs, pairs, 0, 1, 2, 3, 4, 5, 6, 7);
    const auto high = __builtin_shufflevector(pairs, pairs, 8, 9, 10, 11, 12, 13, 14, 15);
    std::memcpy(to, &low, sizeof low);
    if (count > 8) std::memcpy(to + stride, &high, sizeof high);
  }
}

template <int64_t block>
void pack(const uint16_t* first, const uint16_t* second, uint32_t* to, int64_t pixels, int64_t channels,
          int64_t stride) {
  const int64_t whole = channels / 16 * 16, rest = channels - whole;
  for (int64_t p = 0; p < pixels; ++p, to += block, first += channels, second += second ? channels : 0) {
    uint32_t* target = to;
    for (int64_t c = 0; c < whole; c += 16, target += 16 / block * stride) {
      Words pairs = load_channels(first + c);
      if (second) pairs |= load_channels(second + c) << 16;
      store_channels<block>(pairs, target, stride, 16);
    }
    if (rest) {
      Words pairs = load_channels(first + whole, rest);
      if (second) pairs |= load_channels(second + whole, rest) << 16;
      store_channels<block>(pairs, target, stride, rest);
    }
  }
}

// 24 of the 32 vector registers.
using Sums = __m512[output_block][3];

// One pixel of the gradient times its neighbours in one row of the input, those from kx = first to last.
template <int first, int last>
inline __attribute__((always_inline)) void add_pixel(Sums& sums, const uint32_t* input, const uint32_t* gradient) {
  __m512bh neighbours[3];
#pragma GCC unroll 3
  for (int kx = first; kx <= last; ++kx)
    neighbours[kx] = (__m512bh)_mm512_loadu_si512(input + (kx - 1) * input_block);
#pragma GCC unroll 8
  for (int k = 0; k < output_block; ++k) {
    const __m512bh value = (__m512bh)_mm512_set1_epi32(int(gradient[k]));
#pragma GCC unroll 3
    for (int kx = first; kx <= last; ++kx) sums[k][kx] = _mm512_dpbf16_ps(sums[k][kx], neighbours[kx], value);
  }
}

// Neighbours outside the map are left out rather than read as zeros: a sixth of the products on maps of 8x8.
void tile(const uint32_t* input, const uint32_t* gradient, float* result, int64_t pairs, int64_t height,
          int64_t width) {
  for (int64_t ky = 0; ky < 3; ++ky) {
    Sums sums = {};
    const int64_t from = ky == 0 ? 1 : 0, to = ky == 2 ? height - 1 : height;
    for (int64_t pair = 0; pair < pairs; ++pair)
      for (int64_t y = from; y < to; ++y) {
        const uint32_t* neighbours = input + (pair * height + y + ky - 1) * width * input_block;
        const uint32_t* pixels = gradient + (pair * height + y) * width * output_block;
        if (width == 1) {
          add_pixel<1, 1>(sums, neighbours, pixels);
          continue;
        }
        add_pixel<1, 2>(sums, neighbours, pixels);
        for (int64_t x = 1; x < width - 1; ++x)
          add_pixel<0, 2>(sums, neighbours + x * input_block, pixels + x * output_block);
        add_pixel<0, 1>(sums, neighbours + (width - 1) * input_block, pixels + (width - 1) * output_block);
      }
#pragma GCC unroll 8
    for (int k = 0; k < output_block; ++k)
#pragma GCC unroll 3
      for (int kx = 0; kx < 3; ++kx, result += input_block) _mm512_storeu_ps(result, sums[k][kx]);
  }
}

// Where the 16 lanes of each of nine vectors of [input_block, 9] lie among nine vectors of [9, input_block].
struct Transposition {
  alignas(64) int32_t channel[9][16];
  uint16_t lanes_of_tap[9][9];

  constexpr Transposition() : channel(), lanes_of_tap() {
    for (int i = 0; i < 9 * 16; ++i) {
      channel[i / 16][i % 16] = i / 9;
      lanes_of_tap[i / 16][i % 9] = uint16_t(lanes_of_tap[i / 16][i % 9] | 1 << i % 16);
    }
  }
};
constexpr Transposition transposition;

void taps_last(const float* sums, float* to) {
  __m512 taps[9];
#pragma GCC unroll 9
  for (int tap = 0; tap < 9; ++tap)
    taps[tap] = _mm512_loadu_ps(sums + (tap / 3 * output_block * 3 + tap % 3) * input_block);
  for (int i = 0; i < 9; ++i, to += 16) {
    const __m512i channel = _mm512_load_si512(transposition.channel[i]);
    __m512 mixed = _mm512_setzero_ps();
#pragma GCC unroll 9
    for (int tap = 0; tap < 9; ++tap)
      mixed = _mm512_mask_permutexvar_ps(mixed, transposition.lanes_of_tap[i][tap], channel, taps[tap]);
    _mm512_storeu_ps(to, mixed);
  }
}

}  // namespace

WeightGradientKernels weight_gradient_kernels() { return {pack<input_block>, pack<output_block>, tile, taps_last}; }

}  // namespace avx512_bf16
}  // namespace ftfast
