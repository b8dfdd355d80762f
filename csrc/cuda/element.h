// Elements of a factor as the CUDA kernels read and write them. Everything compiles for the host too.
#pragma once

#include <cstdint>
#include <type_traits>

#include "dtype.h"

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>
#define FTFAST_BOTH __host__ __device__ __forceinline__
#else
#define FTFAST_BOTH inline
#endif

namespace ftfast::cuda {

constexpr int64_t vector_bytes = 16;

FTFAST_BOTH float wide(float value) { return value; }
FTFAST_BOTH double wide(double value) { return value; }
FTFAST_BOTH float wide(int8_t value) { return float(value); }

FTFAST_BOTH float wide(BFloat16 value) {
#if defined(__CUDA_ARCH__)
  return __uint_as_float(uint32_t(value.bits) << 16);
#else
  return to_float(value);
#endif
}

FTFAST_BOTH float wide(Float16 value) {
#if defined(__CUDA_ARCH__)
  return __half2float(__ushort_as_half(value.bits));
#else
  return to_float(value);
#endif
}

FTFAST_BOTH float wide(Float8 value) {
#if defined(__CUDA_ARCH__)
  return __half2float(__half(__nv_cvt_fp8_to_halfraw(value.bits, __NV_E4M3)));
#else
  return to_float(value);
#endif
}

FTFAST_BOTH void round_to(float& place, float value) { place = value; }
FTFAST_BOTH void round_to(double& place, double value) { place = value; }

FTFAST_BOTH void round_to(BFloat16& place, float value) {
#if defined(__CUDA_ARCH__)
  place.bits = __bfloat16_as_ushort(__float2bfloat16_rn(value));
#else
  place = to_bfloat16(value);
#endif
}

FTFAST_BOTH void round_to(Float16& place, float value) {
#if defined(__CUDA_ARCH__)
  place.bits = __half_as_ushort(__float2half_rn(value));
#else
  place = to_float16(value);
#endif
}

// Rounded before anything is added to it: a contracted x * r - y * r is not 0 for equal factors.
FTFAST_BOTH float product(float x, float y) {
#if defined(__CUDA_ARCH__)
  return __fmul_rn(x, y);
#else
  return x * y;
#endif
}

FTFAST_BOTH double product(double x, double y) {
#if defined(__CUDA_ARCH__)
  return __dmul_rn(x, y);
#else
  return x * y;
#endif
}

// What another block wrote: past the L1 cache, which may hold an older value.
template <class Number>
FTFAST_BOTH Number fresh(const Number* place) {
#if defined(__CUDA_ARCH__)
  return __ldcg(place);
#else
  return *place;
#endif
}

template <class Student>
using NumberFor = std::conditional_t<std::is_same_v<Student, double>, double, float>;

// A quantised factor gets no gradient.
template <class Element>
constexpr bool takes_gradient = !std::is_same_v<Element, int8_t> && !std::is_same_v<Element, Float8>;

// So many elements of both factors at once that those of the wider dtype fill a vector.
template <class Student, class Teacher>
constexpr int width_of = int(vector_bytes) / int(sizeof(Student) > sizeof(Teacher) ? sizeof(Student) : sizeof(Teacher));

template <class Element, int width>
struct alignas(sizeof(Element) * width) Vector {
  Element values[width];
};

template <int width, class Element>
FTFAST_BOTH Vector<Element, width> read_vector(const Element* place) {
  return *reinterpret_cast<const Vector<Element, width>*>(place);
}

template <int width, class Element>
FTFAST_BOTH void write_vector(Element* place, const Vector<Element, width>& vector) {
  *reinterpret_cast<Vector<Element, width>*>(place) = vector;
}

}  // namespace ftfast::cuda
