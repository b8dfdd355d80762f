// ftfast._C: raw pointers, sizes and strides in, nothing of torch. Private: ftfast/ops checks every argument before.
#include <pybind11/pybind11.h>

#include <algorithm>
#include <utility>
#include <vector>

#include "attention.h"
#include "batch_norm.h"
#include "store/fingerprint.h"
#include "ft_head.h"
#include "ft_loss.h"
#include "store/read_rows.h"

namespace py = pybind11;

namespace ftfast {
namespace {

std::vector<int64_t> numbers(const py::tuple& tuple) {
  std::vector<int64_t> values;
  values.reserve(tuple.size());
  for (const auto& item : tuple) values.push_back(item.cast<int64_t>());
  return values;
}

// (address, dtype, strides of all dims), or None
Factor factor_of(const py::object& object) {
  Factor factor;
  if (object.is_none()) return factor;
  const auto tuple = object.cast<py::tuple>();
  factor.data = reinterpret_cast<char*>(tuple[0].cast<uintptr_t>());
  factor.dtype = DType(tuple[1].cast<int>());
  const auto strides = numbers(tuple[2].cast<py::tuple>());
  factor.sample_stride = strides[0];
  std::copy(strides.begin() + 1, strides.end(), factor.strides);
  return factor;
}

// Brings the sample's dims into the memory order of the student and merges neighbours that every factor walks as one.
void simplify(Problem& problem, std::vector<int64_t> sizes) {
  std::vector<Factor*> factors;
  for (Factor* factor : {&problem.student, &problem.teacher, &problem.student_gradient, &problem.teacher_gradient})
    if (factor->data) factors.push_back(factor);
  std::vector<int> order;
  for (int d = 0; d < int(sizes.size()); ++d)
    if (sizes[d] != 1) order.push_back(d);
  std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return problem.student.strides[a] > problem.student.strides[b]; });

  const std::vector<Factor> before = [&] {
    std::vector<Factor> copies;
    for (const Factor* factor : factors) copies.push_back(*factor);
    return copies;
  }();
  problem.dims = 0;
  problem.size = 1;
  for (const int d : order) {
    problem.size *= sizes[d];
    bool merges = problem.dims > 0;
    for (size_t f = 0; merges && f < factors.size(); ++f)
      merges = factors[f]->strides[problem.dims - 1] == before[f].strides[d] * sizes[d];
    if (merges) problem.sizes[problem.dims - 1] *= sizes[d];
    else problem.sizes[problem.dims++] = sizes[d];
    for (size_t f = 0; f < factors.size(); ++f) factors[f]->strides[problem.dims - 1] = before[f].strides[d];
  }
  if (problem.dims == 0) {
    problem.sizes[0] = 1;
    problem.dims = 1;
    for (Factor* factor : factors) factor->strides[0] = 1;
  }
  for (Factor* factor : factors) {
    int64_t run = 1;
    factor->dense = true;
    for (int d = problem.dims - 1; d >= 0; run *= problem.sizes[d--])
      factor->dense = factor->dense && factor->strides[d] == run;
  }
}

Problem problem_of(const py::tuple& shape, const py::object& student, const py::object& teacher,
                   const py::object& student_gradient, const py::object& teacher_gradient, int threads) {
  Problem problem;
  auto sizes = numbers(shape);
  problem.samples = sizes[0];
  problem.student = factor_of(student);
  problem.teacher = factor_of(teacher);
  problem.student_gradient = factor_of(student_gradient);
  problem.teacher_gradient = factor_of(teacher_gradient);
  problem.threads = threads;
  sizes.erase(sizes.begin());
  simplify(problem, std::move(sizes));
  return problem;
}

void forward(const py::tuple& shape, const py::object& student, const py::object& teacher,
             const py::object& student_gradient, uintptr_t loss, uintptr_t statistics, int p, bool mean_of_rows,
             double eps, double scale, double upstream, int threads) {
  Problem problem = problem_of(shape, student, teacher, student_gradient, py::none(), threads);
  problem.p = p;
  problem.eps = eps;
  problem.scale = scale;
  problem.upstream = upstream;
  problem.mean_of_rows = mean_of_rows;
  py::gil_scoped_release release;
  ft_loss_forward(problem, reinterpret_cast<void*>(loss), reinterpret_cast<void*>(statistics));
}

void backward(const py::tuple& shape, const py::object& student, const py::object& teacher,
              const py::object& student_gradient, const py::object& teacher_gradient, uintptr_t statistics,
              uintptr_t upstream, int64_t upstream_stride, int p, double scale, int threads) {
  Problem problem = problem_of(shape, student, teacher, student_gradient, teacher_gradient, threads);
  problem.p = p;
  problem.scale = scale;
  py::gil_scoped_release release;
  ft_loss_backward(problem, reinterpret_cast<void*>(statistics), reinterpret_cast<void*>(upstream), upstream_stride);
}

// sums and output may be 0
void slope(uintptr_t gradient, uintptr_t output, int dtype, int64_t rows, int64_t channels, float slope, uintptr_t sums,
           int threads) {
  py::gil_scoped_release release;
  leaky_relu_backward(reinterpret_cast<void*>(gradient), reinterpret_cast<void*>(output), DType(dtype), rows, channels,
                      slope, reinterpret_cast<float*>(sums), threads);
}

void unfold(uintptr_t from, uintptr_t to, int64_t element_bytes, int64_t samples, int64_t height, int64_t width,
            int64_t channels, int threads) {
  py::gil_scoped_release release;
  unfold_3x3(reinterpret_cast<void*>(from), reinterpret_cast<void*>(to), element_bytes, samples, height, width,
             channels, threads);
}

void taps_first(uintptr_t from, uintptr_t to, int dtype, int64_t outputs, int64_t channels, int threads) {
  py::gil_scoped_release release;
  weight_taps_first(reinterpret_cast<float*>(from), reinterpret_cast<void*>(to), DType(dtype), outputs, channels,
                    threads);
}

void taps_last(uintptr_t from, uintptr_t to, int dtype, int64_t outputs, int64_t channels, float scale, int threads) {
  py::gil_scoped_release release;
  weight_taps_last(reinterpret_cast<void*>(from), reinterpret_cast<float*>(to), DType(dtype), outputs, channels, scale,
                   threads);
}

// upstream is 0 for the map, else result is the features' gradient
void attention(uintptr_t features, uintptr_t upstream, uintptr_t result, int dtype, int64_t samples, int64_t channels,
               int64_t pixels, bool channels_last, int exponent, int threads) {
  AttentionMap work;
  work.features = reinterpret_cast<void*>(features);
  work.upstream = reinterpret_cast<float*>(upstream);
  work.result = reinterpret_cast<void*>(result);
  work.dtype = DType(dtype);
  work.samples = samples;
  work.channels = channels;
  work.pixels = pixels;
  work.channels_last = channels_last;
  work.exponent = exponent;
  work.threads = threads;
  py::gil_scoped_release release;
  (upstream ? attention_gradient : attention_map)(work);
}

// addresses as NormForward has them; residual may be 0
void norm_forward(const py::tuple& addresses, int dtype, int64_t rows, int64_t channels, double eps, double momentum,
                  bool relu, int threads) {
  const auto at = numbers(addresses);
  NormForward work;
  work.z = reinterpret_cast<void*>(at[0]);
  work.residual = reinterpret_cast<void*>(at[1]);
  work.y = reinterpret_cast<void*>(at[2]);
  work.weight = reinterpret_cast<float*>(at[3]);
  work.bias = reinterpret_cast<float*>(at[4]);
  work.running_mean = reinterpret_cast<float*>(at[5]);
  work.running_variance = reinterpret_cast<float*>(at[6]);
  work.mean = reinterpret_cast<float*>(at[7]);
  work.inverse_deviation = reinterpret_cast<float*>(at[8]);
  work.dtype = DType(dtype);
  work.rows = rows;
  work.channels = channels;
  work.eps = eps;
  work.momentum = momentum;
  work.relu = relu;
  work.threads = threads;
  py::gil_scoped_release release;
  batch_norm_forward(work);
}

// addresses as NormBackward has them; y and residual_gradient may be 0
void norm_backward(const py::tuple& addresses, int dtype, int64_t rows, int64_t channels, bool relu, int threads) {
  const auto at = numbers(addresses);
  NormBackward work;
  work.gradient = reinterpret_cast<void*>(at[0]);
  work.y = reinterpret_cast<void*>(at[1]);
  work.z = reinterpret_cast<void*>(at[2]);
  work.residual_gradient = reinterpret_cast<void*>(at[3]);
  work.z_gradient = reinterpret_cast<void*>(at[4]);
  work.weight = reinterpret_cast<float*>(at[5]);
  work.bias = reinterpret_cast<float*>(at[6]);
  work.mean = reinterpret_cast<float*>(at[7]);
  work.inverse_deviation = reinterpret_cast<float*>(at[8]);
  work.weight_gradient = reinterpret_cast<float*>(at[9]);
  work.bias_gradient = reinterpret_cast<float*>(at[10]);
  work.dtype = DType(dtype);
  work.rows = rows;
  work.channels = channels;
  work.relu = relu;
  work.threads = threads;
  py::gil_scoped_release release;
  batch_norm_backward(work);
}

// addresses and sizes in bytes, one after the other
uint64_t fingerprint_of(const py::tuple& addresses_and_bytes, int threads) {
  const auto given = numbers(addresses_and_bytes);
  std::vector<Span> spans;
  for (size_t i = 0; i + 1 < given.size(); i += 2)
    spans.push_back({reinterpret_cast<const char*>(given[i]), given[i + 1]});
  py::gil_scoped_release release;
  return fingerprint(spans, threads);
}

std::pair<int64_t, int> rows_of_files(uintptr_t descriptors, uintptr_t offsets, int64_t rows, int64_t row_bytes, uintptr_t out) {
  py::gil_scoped_release release;
  const ReadFailure failure = read_rows(
      reinterpret_cast<const int32_t*>(descriptors), reinterpret_cast<const int64_t*>(offsets), rows, row_bytes,
      reinterpret_cast<char*>(out));
  return {failure.row, failure.error};
}

}  // namespace
}  // namespace ftfast

namespace ftfast {
void bind_convolutions(py::module_& module);  // bindings_conv3x3.cpp
}
#if defined(FTFAST_CUDA)
namespace ftfast::cuda {
void bind(py::module_& module);  // bindings_cuda.cpp
}
#endif

PYBIND11_MODULE(_C, module) {
  module.doc() = "Private kernels of ftfast; use ftfast.ft_loss.";
  module.def("instruction_set", &ftfast::instruction_set);
  module.def("ft_loss_forward", &ftfast::forward);
  module.def("ft_loss_backward", &ftfast::backward);
  module.def("leaky_relu_backward", &ftfast::slope);
  module.def("attention", &ftfast::attention);
  module.def("batch_norm_forward", &ftfast::norm_forward);
  module.def("batch_norm_backward", &ftfast::norm_backward);
  module.def("fingerprint", &ftfast::fingerprint_of);
  module.def("read_rows", &ftfast::rows_of_files);
  module.def("unfold_3x3", &ftfast::unfold);
  module.def("weight_taps_first", &ftfast::taps_first);
  module.def("weight_taps_last", &ftfast::taps_last);
  ftfast::bind_convolutions(module);
#if defined(FTFAST_CUDA)
  ftfast::cuda::bind(module);
#endif
}
