// The CUDA kernels' part of ftfast._C. Factors come as (address, dtype, elements from sample to sample), numbers in
// device memory as addresses, 0 for none.
#if defined(FTFAST_CUDA)

#include <pybind11/pybind11.h>

#include "cuda/ft_loss.h"

namespace py = pybind11;

namespace ftfast::cuda {
namespace {

template <class Pointer = void*>
Pointer at(uintptr_t address) {
  return reinterpret_cast<Pointer>(address);
}

Rows rows_of(const py::object& object) {
  Rows rows;
  if (object.is_none()) return rows;
  const auto tuple = object.cast<py::tuple>();
  rows.data = at(tuple[0].cast<uintptr_t>());
  rows.dtype = DType(tuple[1].cast<int>());
  rows.stride = tuple[2].cast<int64_t>();
  return rows;
}

void forward(const py::object& student, const py::object& teacher, int64_t samples, int64_t size, int p,
             bool per_sample, double eps, double scale, uintptr_t weight, uintptr_t loss, uintptr_t statistics,
             uintptr_t counter, int device, uintptr_t stream) {
  Forward job;
  job.student = rows_of(student);
  job.teacher = rows_of(teacher);
  job.samples = samples;
  job.size = size;
  job.p = p;
  job.per_sample = per_sample;
  job.eps = eps;
  job.scale = scale;
  job.weight = at(weight);
  job.loss = at(loss);
  job.statistics = at(statistics);
  job.counter = at<int32_t*>(counter);
  py::gil_scoped_release release;
  ft_loss_forward(job, device, at(stream));
}

void backward(const py::object& student, const py::object& teacher, const py::object& student_gradient,
              const py::object& teacher_gradient, int64_t samples, int64_t size, int p, double scale, uintptr_t weight,
              uintptr_t statistics, uintptr_t upstream, int64_t upstream_stride, int device, uintptr_t stream) {
  Backward job;
  job.student = rows_of(student);
  job.teacher = rows_of(teacher);
  job.student_gradient = rows_of(student_gradient);
  job.teacher_gradient = rows_of(teacher_gradient);
  job.samples = samples;
  job.size = size;
  job.p = p;
  job.scale = scale;
  job.weight = at(weight);
  job.statistics = at(statistics);
  job.upstream = at(upstream);
  job.upstream_stride = upstream_stride;
  py::gil_scoped_release release;
  ft_loss_backward(job, device, at(stream));
}

}  // namespace

void bind(py::module_& module) {
  module.def("ft_loss_cuda_forward", &forward);
  module.def("ft_loss_cuda_backward", &backward);
  module.def("ft_loss_cuda_problem", &ft_loss_problem);
}

}  // namespace ftfast::cuda

#endif
