// ftfast._C: raw pointers, sizes and strides in, nothing of torch. Private: ftfast/ops checks every argument before.
#include <utility>
#include <vector>

#include "attention.h"
#include "batch_norm.h"
#include "bindings.h"
#include "ft_head.h"
#include "store/fingerprint.h"
#include "store/read_rows.h"

namespace ftfast {
namespace {

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

AttentionMap map_of(uintptr_t features, int dtype, int64_t samples, int64_t channels, int64_t pixels,
                    bool channels_last, int exponent, int threads) {
  AttentionMap work;
  work.features = reinterpret_cast<void*>(features);
  work.dtype = DType(dtype);
  work.samples = samples;
  work.channels = channels;
  work.pixels = pixels;
  work.channels_last = channels_last;
  work.exponent = exponent;
  work.threads = threads;
  return work;
}

// upstream is 0 for the map, else result is the features' gradient
void attention(const AttentionMap& map, uintptr_t upstream, uintptr_t result) {
  AttentionMap work = map;
  work.upstream = reinterpret_cast<float*>(upstream);
  work.result = reinterpret_cast<void*>(result);
  py::gil_scoped_release release;
  (upstream ? attention_gradient : attention_map)(work);
}

// gradient is 0 where it is not wanted
float difference(const AttentionMap& student, uintptr_t teacher_map, uintptr_t gradient, int p, double eps,
                 double upstream) {
  AttentionDifference work{student, reinterpret_cast<float*>(teacher_map), p, eps, upstream};
  work.student.result = reinterpret_cast<void*>(gradient);
  py::gil_scoped_release release;
  return attention_difference(work);
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
void bind_convolutions(py::module_& module);  // conv3x3.cpp
void bind_loss(py::module_& module);          // ft_loss.cpp
}
#if defined(FTFAST_CUDA)
namespace ftfast::cuda {
void bind(py::module_& module);  // cuda.cpp
}
#endif

PYBIND11_MODULE(_C, module) {
  module.doc() = "Private kernels of ftfast; use ftfast.ft_loss.";
  module.def("instruction_set", &ftfast::instruction_set);
  module.def("leaky_relu_backward", &ftfast::slope);
  py::class_<ftfast::AttentionMap>(module, "AttentionMap").def(py::init(&ftfast::map_of));
  module.def("attention", &ftfast::attention);
  module.def("attention_difference", &ftfast::difference);
  module.def("batch_norm_forward", &ftfast::norm_forward);
  module.def("batch_norm_backward", &ftfast::norm_backward);
  module.def("fingerprint", &ftfast::fingerprint_of);
  module.def("read_rows", &ftfast::rows_of_files);
  module.def("unfold_3x3", &ftfast::unfold);
  module.def("weight_taps_first", &ftfast::taps_first);
  module.def("weight_taps_last", &ftfast::taps_last);
  ftfast::bind_convolutions(module);
  ftfast::bind_loss(module);
#if defined(FTFAST_CUDA)
  ftfast::cuda::bind(module);
#endif
}
