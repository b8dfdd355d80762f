// The factor transfer loss on a CUDA device: what the launches (ft_loss.cu) take. Nothing of CUDA and nothing of torch.
#pragma once

#include <cstdint>
#include <string>

#include "../ft_loss.h"

namespace ftfast::cuda {

// A factor or a gradient [N, D]: each sample is one run of memory, and all of them in the same order.
struct Rows {
  void* data = nullptr;
  DType dtype = DType::float32;
  int64_t stride = 0;  // elements from sample to sample
};

// "Number" is the type of sums and results: double where the factors are float64 (both are, or neither), else float.
struct Forward {
  Rows student, teacher;
  int64_t samples, size;     // N and D
  int p;                     // 1 or 2
  double eps;                // 0, or a normal Number
  double scale;              // of the reduction, times a weight that is a number
  const void* weight;        // one Number, or null
  bool per_sample;           // reduction "none"
  void* loss;                // Number, [N] where per_sample
  void* statistics;          // Number [5, N]: both reciprocal norms, <g, a>, <g, b> (0 where the norm is clamped), l
  int32_t* counter;          // 0 before and after; not used where per_sample
};

struct Backward {
  Rows student, teacher, student_gradient, teacher_gradient;  // a gradient without data is not computed
  int64_t samples, size;
  int p;
  double scale;
  const void* weight;
  const void* statistics;    // as forward wrote them
  const void* upstream;      // Number, one every upstream_stride
  int64_t upstream_stride;
};

// Launch on a stream of the device, which stays the thread's current one. A failure throws std::runtime_error.
void ft_loss_forward(const Forward& job, int device, void* stream);
void ft_loss_backward(const Backward& job, int device, void* stream);

// Why these kernels do not run on the device; empty where they do.
std::string ft_loss_problem(int device);

}  // namespace ftfast::cuda
