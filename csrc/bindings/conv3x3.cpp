// The 3x3 convolutions' part of ftfast._C: what this processor cannot run is absent.
#include <pybind11/pybind11.h>

#include "conv3x3/conv3x3.h"
#include "conv3x3/conv3x3_direct.h"
#include "conv3x3/conv3x3_tiles.h"
#include "conv3x3/tile_permission.h"

namespace py = pybind11;

namespace ftfast {
namespace {

void copy_strides(const py::tuple& from, int64_t to[4]) {
  for (size_t i = 0; i < 4; ++i) to[i] = from[i].cast<int64_t>();
}

template <void (*compute)(const WeightGradient&)>
void weight_gradient(uintptr_t input, uintptr_t gradient, int64_t samples, int64_t height, int64_t width,
                     int64_t channels, int64_t outputs, uintptr_t result, const py::tuple& strides, int threads) {
  WeightGradient work;
  work.input = reinterpret_cast<uint16_t*>(input);
  work.gradient = reinterpret_cast<uint16_t*>(gradient);
  work.result = reinterpret_cast<float*>(result);
  copy_strides(strides, work.strides);
  work.samples = samples;
  work.height = height;
  work.width = width;
  work.channels = channels;
  work.outputs = outputs;
  work.threads = threads;
  py::gil_scoped_release release;
  compute(work);
}

// bias and residual may be 0
template <void (*compute)(const DirectConvolution&)>
void convolution(uintptr_t input, uintptr_t weight, uintptr_t bias, uintptr_t residual, uintptr_t result,
                 int64_t samples, int64_t height, int64_t width, int64_t channels, int64_t outputs,
                 float negative_slope, int threads) {
  DirectConvolution work;
  work.input = reinterpret_cast<uint16_t*>(input);
  work.weight = reinterpret_cast<uint16_t*>(weight);
  work.bias = reinterpret_cast<float*>(bias);
  work.residual = reinterpret_cast<uint16_t*>(residual);
  work.result = reinterpret_cast<uint16_t*>(result);
  work.samples = samples;
  work.height = height;
  work.width = width;
  work.channels = channels;
  work.outputs = outputs;
  work.negative_slope = negative_slope;
  work.threads = threads;
  py::gil_scoped_release release;
  compute(work);
}

template <decltype(pack_direct_weight) pack>
void pack_weight(uintptr_t from, const py::tuple& strides, int64_t outputs, int64_t channels, bool for_gradient,
                 uintptr_t to, int threads) {
  int64_t of_weight[4];
  copy_strides(strides, of_weight);
  py::gil_scoped_release release;
  pack(reinterpret_cast<float*>(from), of_weight, outputs, channels, for_gradient, reinterpret_cast<uint16_t*>(to),
       threads);
}

}  // namespace

void bind_convolutions(py::module_& module) {
  module.def("why_no_tiles", &why_no_tiles);
  if (weight_gradient_kernels().tile) module.def("conv3x3_weight_gradient", &weight_gradient<conv3x3_weight_gradient>);
  if (direct_kernels().rows16) {
    module.def("conv3x3_direct", &convolution<conv3x3_direct>);
    module.def("pack_direct_weight", &pack_weight<pack_direct_weight>);
  }
  if (tile_kernels().rows16) {
    module.def("conv3x3_tiles", &convolution<conv3x3_tiles>);
    module.def("pack_tiles_weight", &pack_weight<pack_tiles_weight>);
    module.def("conv3x3_tiles_weight_gradient", &weight_gradient<conv3x3_tiles_weight_gradient>);
  }
}

}  // namespace ftfast
