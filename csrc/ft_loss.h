// The factor transfer loss on the CPU: what the driver (ft_loss.cpp) and the row kernels (cpu/ft_loss.cpp) share.
// Kim, Park, Kwak, "Paraphrasing Complex Network: Network Compression via Factor Transfer", NeurIPS 2018.
#pragma once

#include <cstdint>

namespace ftfast {

enum class DType : int { float64, float32, bfloat16, float16, int8, float8_e4m3fn };

// One sample of a pair of factors, both dense. The sums of a row: |s|^2 and |t|^2; then for p=1
// sum |d|, <sign d, a>, <sign d, b>, and for p=2 sum d^2, <d, a>, <d, b>, where d = a - b, a = s*si, b = t*ti.
// Sums of float16, bfloat16 and float32 rows are float, those of float64 rows double; both travel as double.
struct RowKernels {
  // sums[2]; reads every element once
  void (*squares)(const void* s, const void* t, int64_t size, double* sums);
  // sums[3]; touches the first bytes of next_s as it goes, which may be null
  void (*distances)(const void* s, const void* t, int64_t size, int p, double si, double ti, double* sums,
                    const char* next_s);
  // ds = c * (g - a*q), g = sign d for p=1 and d*h for p=2; ds has the dtype of s
  void (*gradient)(const void* s, const void* t, void* ds, int64_t size, int p, double si, double ti, double q,
                   double h, double c, const char* next_t);
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
  bool mean_of_rows = true;  // false: reduction "none"
  int threads = 1;
};

// statistics: [5, N] of float or double: 1/max(|s|, eps), 1/max(|t|, eps), <g, a>, -<g, b>, h. The inner products are
// 0 where a norm is clamped. loss: one number, or [N]; both of the compute type. With problem.student_gradient, ds is
// written for an upstream gradient of 1.
void ft_loss_forward(const Problem& problem, void* loss, void* statistics);

// upstream: one number (stride 0) or [N], of the compute type.
void ft_loss_backward(const Problem& problem, const void* statistics, const void* upstream, int64_t upstream_stride);

// rows[n] *= upstream[n] in place, for the gradient that forward wrote; float32 or float64.
void ft_loss_scale_rows(const Problem& problem, const void* upstream, int64_t upstream_stride);

// The row kernels of the best instruction set of this machine; a pair of dtypes without any gives null.
const RowKernels* row_kernels(DType student, DType teacher);
const char* instruction_set();

}  // namespace ftfast
