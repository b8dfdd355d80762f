// The factor transfer loss on the CPU: what the driver (ft_loss.cpp) and the row kernels (cpu/ft_loss.cpp) share.
// Kim, Park, Kwak, "Paraphrasing Complex Network: Network Compression via Factor Transfer", NeurIPS 2018.
#pragma once

#include <cstdint>

namespace ftfast {

enum class DType : int { float64, float32, bfloat16, float16, int8, float8_e4m3fn };

// One sample of a pair of factors, both dense, in units of the student's norm: d = s - t * r. Sums over float64 rows
// are double, all others float; numbers travel as double.
struct RowKernels {
  // sums[2]: |s|^2 and |t|^2; reads every element once
  void (*squares)(const void* s, const void* t, int64_t size, double* sums);
  // sums[2]: sum |d| and <sign d, s> for p=1, sum d^2 and <d, s> for p=2; and in the same walk the squares of a next
  // sample, if there is one: reading it hides behind the arithmetic. That pays where two samples lie in the first cache.
  void (*distances)(const void* s, const void* t, int64_t size, int p, double r, double* sums, const void* next_s,
                    const void* next_t, double* next_sums);
  // out = c * (g - x * k) with g = h * sign d for p=1 and h * d for p=2; x is s, or t for the teacher's side, and out
  // has its dtype. Both sides see the same d, so that rounding cannot give them unlike signs. past_caches: the gradients
  // are too many to stay in cache until somebody reads them.
  void (*gradient)(const void* s, const void* t, void* out, int64_t size, int p, double r, double h, double k,
                   double c, bool past_caches);
  // gradient of this sample and squares of the next in one walk: reading the one hides behind writing the other.
  void (*gradient_and_next_squares)(const void* s, const void* t, void* out, int64_t size, int p, double r, double h,
                                    double k, double c, const void* next_s, const void* next_t, double* next_sums,
                                    bool past_caches);
  void (*teacher_gradient)(const void* s, const void* t, void* out, int64_t size, int p, double r, double h, double k,
                           double c, bool past_caches);  // null for a quantised teacher
};

constexpr int max_dims = 8;

// A factor [N, ...]: the sample's own dims, outermost first in memory order, strides in elements.
struct Factor {
  char* data = nullptr;
  DType dtype = DType::float32;
  int64_t sample_stride = 0;
  int64_t strides[max_dims] = {};
  bool dense = false;  // the sample is one run of memory in the order of the dims
};

struct Problem {
  int64_t samples = 0, size = 0;  // N and D
  int dims = 0;
  int64_t sizes[max_dims] = {};
  Factor student, teacher, student_gradient, teacher_gradient;  // a gradient without data is not computed
  int p = 1;
  double eps = 0;
  double scale = 0;  // weight and reduction: d loss / d l_n
  double upstream = 1;  // that forward writes the student's gradient for
  bool mean_of_rows = true;  // false: reduction "none"
  int threads = 1;
};

// statistics: [5, N] of float or double: si = 1/max(|s|, eps), ti = 1/max(|t|, eps), <g, a>, -<g, b>, and l, with its
// sign set where C did not hold the sums, so that backward goes forward's way. The inner products are 0 where a norm is
// clamped. Null where nobody wants them. loss: one number, or [N]. Both are of the compute type. With
// problem.student_gradient, ds is written too, with the bits that backward gives it for problem.upstream.
void ft_loss_forward(const Problem& problem, void* loss, void* statistics);

// upstream: one number (stride 0) or [N], of the compute type.
void ft_loss_backward(const Problem& problem, const void* statistics, const void* upstream, int64_t upstream_stride);

// The row kernels of the best instruction set of this machine; throws std::logic_error for dtypes that have none.
RowKernels row_kernels(DType student, DType teacher);
const char* instruction_set();

}  // namespace ftfast
