// 16-bit and 8-bit numbers as bits, and their conversions one at a time.
#pragma once

#include <cstdint>
#include <cstring>

namespace ftfast {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};
struct Float8 {  // e4m3fn: no infinity, 0x7f and 0xff are NaN
  uint8_t bits;
};

// Internal linkage: every instruction set compiles a copy of its own, and the linker must not mix them.
static inline float float_from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

static inline uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

static inline float to_float(BFloat16 value) { return float_from_bits(uint32_t(value.bits) << 16); }

static inline float to_float(Float16 value) {
  const uint32_t sign = uint32_t(value.bits & 0x8000) << 16, magnitude = value.bits & 0x7fff;
  if (magnitude >= 0x7c00) return float_from_bits(sign | 0x7f800000 | (magnitude << 13));
  if (magnitude >= 0x0400) return float_from_bits(sign | ((magnitude << 13) + (112u << 23)));
  const float subnormal = float(magnitude) * 0x1p-24f;
  return sign ? -subnormal : subnormal;
}

static inline float to_float(Float8 value) {
  const int magnitude = value.bits & 0x7f, exponent = magnitude >> 3, mantissa = magnitude & 7;
  float number;
  if (magnitude == 0x7f) number = float_from_bits(0x7fc00000);
  else if (exponent == 0) number = float(mantissa) * 0x1p-9f;
  else number = float_from_bits(uint32_t(exponent + 120) << 23 | uint32_t(mantissa) << 20);
  return value.bits & 0x80 ? -number : number;
}

static inline BFloat16 to_bfloat16(float value) {
  const uint32_t bits = bits_of(value);
  if (value != value) return {uint16_t((bits >> 16) | 0x40)};
  return {uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}

static inline Float16 to_float16(float value) {
  const uint32_t bits = bits_of(value), magnitude = bits & 0x7fffffff;
  const uint16_t sign = uint16_t(bits >> 16 & 0x8000);
  if (magnitude > 0x7f800000) return {uint16_t(sign | 0x7e00)};
  if (magnitude >= 0x477ff000) return {uint16_t(sign | 0x7c00)};  // from 65520 on, to the nearest: infinity
  if (magnitude < 0x38800000) {  // subnormal: adding 0.5 rounds at 2^-24 exactly as wanted
    const float shifted = float_from_bits(magnitude) + 0.5f;
    return {uint16_t(sign | (bits_of(shifted) - 0x3f000000))};
  }
  return {uint16_t(sign | ((magnitude - (112u << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13))};
}

}  // namespace ftfast
