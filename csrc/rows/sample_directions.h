// The loss of samples that float arithmetic does not hold. The loss's driver alone includes it.
#pragma once

#include <vector>

#include "row_buffer.h"

namespace ftfast {
namespace {

// A sample that C does not hold, at its slow but sure way: the directions a and b in double, and the kernels of float64
// with norms of 1. One thread's; it takes memory only where there is such a sample.
class Directions {
 public:
  explicit Directions(const Problem& problem)
      : size_(problem.size), p_(problem.p), kernels_(row_kernels(DType::float64, DType::float64)) {}

  static double squares(const void* row, DType dtype, int64_t size) {
    double sum = 0;
    for (int64_t i = 0; i < size; ++i) sum += value_at(row, dtype, i) * value_at(row, dtype, i);
    return sum;
  }

  void set(const void* s, DType s_dtype, double si, const void* t, DType t_dtype, double ti) {
    for (auto* values : {&a_, &b_, &result_}) values->resize(size_t(size_));
    of_a_ = of_b_ = 0;
    for (int64_t i = 0; i < size_; ++i) {
      a_[i] = value_at(s, s_dtype, i) * si;
      b_[i] = value_at(t, t_dtype, i) * ti;
      of_a_ += 0 * a_[i];
      of_b_ += 0 * b_[i];
    }
  }

  // sums[3]: sum |a - b|, <sign(a - b), a> and <sign(b - a), b> for p=1, and as RowKernels has them for p=2. The last is
  // not taken from the others: sign(NaN) is 0, so that it may be a number where they are none. But 0 times a NaN is NaN.
  void distances(double* sums) const {
    kernels_.distances(b_.data(), a_.data(), size_, p_, 1, sums + 1, nullptr, nullptr, nullptr);  // the third; the second is overwritten
    kernels_.distances(a_.data(), b_.data(), size_, p_, 1, sums, nullptr, nullptr, nullptr);
    sums[1] += of_a_;
    sums[2] += of_b_;
  }

  // factor * (g - a * product), h * (a - b) being g for p=2
  void student_gradient(void* out, DType dtype, double h, double product, double factor) {
    kernels_.gradient(a_.data(), b_.data(), result_.data(), size_, p_, 1, h, product, factor, false);
    put(out, dtype);
  }

  void teacher_gradient(void* out, DType dtype, double h, double product, double factor) {
    kernels_.gradient(b_.data(), a_.data(), result_.data(), size_, p_, 1, h, product, factor, false);
    put(out, dtype);
  }

 private:
  void put(void* out, DType dtype) const {
    for (int64_t i = 0; i < size_; ++i) put_value(out, dtype, i, result_[size_t(i)]);
  }

  int64_t size_;
  int p_;
  RowKernels kernels_;
  std::vector<double> a_, b_, result_;
  double of_a_ = 0, of_b_ = 0;  // 0, or NaN where a or b has one
};

}  // namespace
}  // namespace ftfast
