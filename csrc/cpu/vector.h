// A register of C (float or double), as wide as the instruction set that this file is compiled for.
// GCC's and clang's vector extensions do the arithmetic; only float16 and fused multiply-add need intrinsics.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "dtype.h"

namespace ftfast {
namespace FTFAST_INSTRUCTION_SET {

#if defined(__AVX512F__)
constexpr int vector_bytes = 64;
#elif defined(__AVX2__)
constexpr int vector_bytes = 32;
#else
constexpr int vector_bytes = 16;
#endif

constexpr int float_lanes = vector_bytes / 4;

typedef float Floats __attribute__((vector_size(vector_bytes)));
typedef int32_t FloatBits __attribute__((vector_size(vector_bytes)));
typedef double Doubles __attribute__((vector_size(vector_bytes)));
typedef int64_t DoubleBits __attribute__((vector_size(vector_bytes)));

template <class C>
struct Register;
template <>
struct Register<float> {
  using Values = Floats;
  using Bits = FloatBits;
  static constexpr int32_t sign_bit = INT32_MIN;
};
template <>
struct Register<double> {
  using Values = Doubles;
  using Bits = DoubleBits;
  static constexpr int64_t sign_bit = INT64_MIN;
};

template <class Vector>
inline Vector load_bytes(const void* source) {
  Vector vector;
  std::memcpy(&vector, source, sizeof(Vector));
  return vector;
}

inline Floats load(const float* source) { return load_bytes<Floats>(source); }
inline Doubles load(const double* source) { return load_bytes<Doubles>(source); }
inline void store(float* target, Floats values) { std::memcpy(target, &values, sizeof values); }
inline void store(double* target, Doubles values) { std::memcpy(target, &values, sizeof values); }

typedef uint16_t Halves __attribute__((vector_size(vector_bytes / 2)));
typedef uint32_t Words __attribute__((vector_size(vector_bytes)));
typedef int8_t Bytes __attribute__((vector_size(vector_bytes / 4)));

inline Floats load(const BFloat16* source) {
  return reinterpret_cast<Floats>(__builtin_convertvector(load_bytes<Halves>(source), Words) << 16);
}

#if defined(__AVX512BF16__)
inline Halves to_halves(const BFloat16*, Floats values) { return (Halves)_mm512_cvtneps_pbh((__m512)values); }
#else
inline Halves to_halves(const BFloat16*, Floats values) {
  const Words bits = reinterpret_cast<Words>(values);
  const Words to_even = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const Words nan = (bits >> 16) | 0x40;
  return __builtin_convertvector(values != values ? nan : to_even, Halves);
}
#endif

inline Floats load(const int8_t* source) {
  return __builtin_convertvector(__builtin_convertvector(load_bytes<Bytes>(source), FloatBits), Floats);
}

#if defined(__AVX512F__)
inline Floats load(const Float16* source) { return (Floats)_mm512_cvtph_ps(load_bytes<__m256i>(source)); }
inline Halves to_halves(const Float16*, Floats values) {
  return (Halves)_mm512_cvtps_ph((__m512)values, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
inline Floats multiply_add(Floats a, Floats b, Floats c) {
  return (Floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
}
inline Floats subtract_product(Floats c, Floats a, Floats b) {
  return (Floats)_mm512_fnmadd_ps((__m512)a, (__m512)b, (__m512)c);
}
#elif defined(__AVX2__)
inline Floats load(const Float16* source) { return (Floats)_mm256_cvtph_ps(load_bytes<__m128i>(source)); }
inline Halves to_halves(const Float16*, Floats values) {
  return (Halves)_mm256_cvtps_ph((__m256)values, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
inline Floats multiply_add(Floats a, Floats b, Floats c) {
  return (Floats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
}
inline Floats subtract_product(Floats c, Floats a, Floats b) {
  return (Floats)_mm256_fnmadd_ps((__m256)a, (__m256)b, (__m256)c);
}
#else
inline Floats load(const Float16* source) {
  Floats values;
  for (int i = 0; i < float_lanes; ++i) values[i] = to_float(source[i]);
  return values;
}
inline Halves to_halves(const Float16*, Floats values) {
  Halves halves;
  for (int i = 0; i < float_lanes; ++i) halves[i] = to_float16(values[i]).bits;
  return halves;
}
inline Floats multiply_add(Floats a, Floats b, Floats c) { return a * b + c; }
inline Floats subtract_product(Floats c, Floats a, Floats b) { return c - a * b; }
#endif
template <class Half>
inline void store(Half* target, Floats values) {
  const Halves halves = to_halves(target, values);
  std::memcpy(target, &halves, sizeof halves);
}
inline float multiply_add(float a, float b, float c) { return a * b + c; }
inline Doubles multiply_add(Doubles a, Doubles b, Doubles c) { return a * b + c; }
inline Doubles subtract_product(Doubles c, Doubles a, Doubles b) { return c - a * b; }

template <class C>
inline typename Register<C>::Values absolute(typename Register<C>::Values x) {
  using Bits = typename Register<C>::Bits;
  return reinterpret_cast<typename Register<C>::Values>(reinterpret_cast<Bits>(x) & ~Register<C>::sign_bit);
}

// x * sign(d) with sign(0) = sign(NaN) = 0, in bit operations
template <class C>
inline typename Register<C>::Values signed_by(typename Register<C>::Values d, typename Register<C>::Values x) {
  using Bits = typename Register<C>::Bits;
  const Bits flipped = reinterpret_cast<Bits>(x) ^ (reinterpret_cast<Bits>(d) & Register<C>::sign_bit);
  return reinterpret_cast<typename Register<C>::Values>(flipped & ((d < 0) | (d > 0)));
}
// sum + x * sign(d)
template <class C>
inline typename Register<C>::Values add_signed(typename Register<C>::Values sum, typename Register<C>::Values d,
                                               typename Register<C>::Values x) {
  return sum + signed_by<C>(d, x);
}
#if defined(__AVX512F__)
// The same with mask registers, which the compiler does not find by itself; 0x78 is a ^ (b & c).
inline __m512 flip_by(Floats d, Floats x) {
  const __m512i sign_bit = _mm512_set1_epi32(INT32_MIN);
  return _mm512_castsi512_ps(_mm512_ternarylogic_epi32((__m512i)x, (__m512i)d, sign_bit, 0x78));
}
inline __mmask16 has_sign(Floats d) { return _mm512_cmp_ps_mask((__m512)d, _mm512_setzero_ps(), _CMP_NEQ_OQ); }
template <>
inline Floats signed_by<float>(Floats d, Floats x) {
  return (Floats)_mm512_maskz_mov_ps(has_sign(d), flip_by(d, x));
}
template <>
inline Floats add_signed<float>(Floats sum, Floats d, Floats x) {
  return (Floats)_mm512_mask_add_ps((__m512)sum, has_sign(d), (__m512)sum, flip_by(d, x));
}
#endif

// In halves, always the same ones.
inline double sum(Doubles values) {
  double total = 0;
  for (int i = 0; i < vector_bytes / 8; ++i) total += values[i];
  return total;
}
#if defined(__AVX512F__)
inline float sum(Floats values) { return _mm512_reduce_add_ps((__m512)values); }
#else
inline float sum(Floats values) {
  float parts[float_lanes];
  store(parts, values);
  for (int half = float_lanes / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) parts[i] += parts[i + half];
  return parts[0];
}
#endif

// What many registers of C add up to, in double.
template <class C>
struct DoubleSum;
template <>
struct DoubleSum<double> {
  Doubles lanes = {};

  void add(Doubles values) { lanes += values; }
  double sum() const { return FTFAST_INSTRUCTION_SET::sum(lanes); }
};
template <>
struct DoubleSum<float> {
  typedef float Half __attribute__((vector_size(vector_bytes / 2)));
  Doubles lanes = {};

  void add(Floats values) {
    Half halves[2];
    std::memcpy(halves, &values, sizeof values);
    lanes += __builtin_convertvector(halves[0], Doubles) + __builtin_convertvector(halves[1], Doubles);
  }
  double sum() const { return FTFAST_INSTRUCTION_SET::sum(lanes); }
};

// Past the caches: for results that would not stay there anyway. The target is aligned to what is stored. fence_streams
// comes before another thread may read them.
#if defined(__AVX512F__)
inline void stream(float* target, Floats values) { _mm512_stream_ps(target, (__m512)values); }
#elif defined(__AVX2__)
inline void stream(float* target, Floats values) { _mm256_stream_ps(target, (__m256)values); }
#endif
template <class T, class Values>
inline void stream(T* target, Values values) {
  store(target, values);
}
template <bool streaming, class T, class Values>
inline void put(T* target, Values values) {
  if constexpr (streaming) stream(target, values);
  else store(target, values);
}
inline void fence_streams() {
#if defined(__AVX2__)
  _mm_sfence();
#endif
}

// Whether stream() may store whole registers from here on.
template <class T>
inline bool streams_to(const T* target) {
  return reinterpret_cast<uintptr_t>(target) % (float_lanes * sizeof(T)) == 0;
}

}  // namespace FTFAST_INSTRUCTION_SET
}  // namespace ftfast
