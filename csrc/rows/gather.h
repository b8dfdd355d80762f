// Samples of any strides to dense memory and back.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <utility>

namespace ftfast {

// A register of E, and squares of as many of them.
template <class E, int bytes = 16>
struct Block {
  static constexpr int64_t size = bytes / int64_t(sizeof(E));
  typedef E Row __attribute__((vector_size(bytes)));

  // a0 b0 a1 b1 ... of the first halves (half = 0) or the second ones (half = size / 2)
  template <int half, int... lane>
  static Row interleave(Row a, Row b, std::integer_sequence<int, lane...>) {
    return __builtin_shufflevector(a, b, (lane / 2 + half + (lane & 1) * int(size))...);
  }

  // A perfect shuffle of all rows, repeated log2(size) times, transposes the square.
  static void transpose(E* target, int64_t target_stride, const E* source, int64_t source_stride) {
    constexpr auto lanes = std::make_integer_sequence<int, int(size)>();
    Row rows[size], mixed[size];
    for (int64_t i = 0; i < size; ++i) std::memcpy(&rows[i], source + i * source_stride, sizeof(Row));
    for (int64_t round = 1; round < size; round *= 2) {
      for (int64_t i = 0; i < size / 2; ++i) {
        mixed[2 * i] = interleave<0>(rows[i], rows[i + size / 2], lanes);
        mixed[2 * i + 1] = interleave<int(size / 2)>(rows[i], rows[i + size / 2], lanes);
      }
      std::copy(mixed, mixed + size, rows);
    }
    for (int64_t i = 0; i < size; ++i) std::memcpy(target + i * target_stride, &rows[i], sizeof(Row));
  }
};

// dense[i, j] = source[j * stride + i]: the source is dense along the outer of two dims, as channels_last is against
// NCHW.
template <class E>
void transpose(E* dense, const E* source, int64_t outer, int64_t inner, int64_t stride) {
  constexpr int64_t block = Block<E>::size, line = 64 / int64_t(sizeof(E)), ahead = 16;
  const int64_t whole_outer = outer / block * block, whole_inner = inner / block * block;
  for (int64_t j = 0; j < whole_inner; j += block) {
    // The processor does not see that the rows of the next blocks are one run of memory.
    for (int64_t row = j + ahead; row < std::min(j + ahead + block, inner); ++row)
      for (int64_t i = 0; i < outer; i += line) __builtin_prefetch(source + row * stride + i);
    for (int64_t i = 0; i < whole_outer; i += block)
      Block<E>::transpose(dense + i * inner + j, inner, source + j * stride + i, stride);
    for (int64_t i = whole_outer; i < outer; ++i)
      for (int64_t row = j; row < j + block; ++row) dense[i * inner + row] = source[row * stride + i];
  }
  for (int64_t j = whole_inner; j < inner; ++j)
    for (int64_t i = 0; i < outer; ++i) dense[i * inner + j] = source[j * stride + i];
}

template <class E>
void gather(E* dense, const E* source, const int64_t* sizes, const int64_t* strides, int dims) {
  if (dims == 1) {
    for (int64_t i = 0; i < sizes[0]; ++i) dense[i] = source[i * strides[0]];
    return;
  }
  if (dims == 2 && strides[0] == 1) return transpose(dense, source, sizes[0], sizes[1], strides[1]);
  int64_t inner = 1;
  for (int d = 1; d < dims; ++d) inner *= sizes[d];
  for (int64_t i = 0; i < sizes[0]; ++i)
    gather(dense + i * inner, source + i * strides[0], sizes + 1, strides + 1, dims - 1);
}

template <class E>
void scatter(E* target, const E* dense, const int64_t* sizes, const int64_t* strides, int dims) {
  int64_t inner = 1;
  for (int d = 1; d < dims; ++d) inner *= sizes[d];
  for (int64_t i = 0; i < sizes[0]; ++i) {
    if (dims == 1) target[i * strides[0]] = dense[i];
    else scatter(target + i * strides[0], dense + i * inner, sizes + 1, strides + 1, dims - 1);
  }
}

}  // namespace ftfast
