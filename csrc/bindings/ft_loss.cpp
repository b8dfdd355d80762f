// The loss's part of ftfast._C. What does not change from call to call is worked out once, in LossProblem.
#include <algorithm>
#include <utility>
#include <vector>

#include "bindings.h"
#include "ft_loss.h"

namespace ftfast {
namespace {

// strides of all dims
Factor factor_of(int dtype, const py::tuple& all_strides) {
  Factor factor;
  factor.dtype = DType(dtype);
  const auto strides = numbers(all_strides);
  factor.sample_stride = strides[0];
  std::copy(strides.begin() + 1, strides.end(), factor.strides);
  return factor;
}

// Brings the sample's dims into the memory order of the student and merges neighbours that every factor walks as one.
void simplify(Problem& problem, std::vector<int64_t> sizes) {
  const std::vector<Factor*> factors = {&problem.student, &problem.teacher, &problem.student_gradient,
                                        &problem.teacher_gradient};
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

char* at(uintptr_t address) { return reinterpret_cast<char*>(address); }

// Factors of one kind and their gradients, which have their dtypes. A call gives addresses; 0 for a gradient that is not
// computed.
class LossProblem {
 public:
  LossProblem(const py::tuple& shape, int student_dtype, const py::tuple& student, const py::tuple& student_gradient,
              int teacher_dtype, const py::tuple& teacher, const py::tuple& teacher_gradient, int p, bool mean_of_rows,
              double eps) {
    auto sizes = numbers(shape);
    problem_.samples = sizes[0];
    problem_.student = factor_of(student_dtype, student);
    problem_.student_gradient = factor_of(student_dtype, student_gradient);
    problem_.teacher = factor_of(teacher_dtype, teacher);
    problem_.teacher_gradient = factor_of(teacher_dtype, teacher_gradient);
    problem_.p = p;
    problem_.mean_of_rows = mean_of_rows;
    problem_.eps = eps;
    sizes.erase(sizes.begin());
    simplify(problem_, std::move(sizes));
  }

  void forward(uintptr_t student, uintptr_t teacher, uintptr_t student_gradient, uintptr_t loss, uintptr_t statistics,
               double scale, double upstream, int threads) const {
    Problem problem = at_addresses(student, teacher, student_gradient, 0, scale, threads);
    problem.upstream = upstream;
    py::gil_scoped_release release;
    ft_loss_forward(problem, at(loss), at(statistics));
  }

  void backward(uintptr_t student, uintptr_t teacher, uintptr_t student_gradient, uintptr_t teacher_gradient,
                uintptr_t statistics, uintptr_t upstream, int64_t upstream_stride, double scale, int threads) const {
    const Problem problem = at_addresses(student, teacher, student_gradient, teacher_gradient, scale, threads);
    py::gil_scoped_release release;
    ft_loss_backward(problem, at(statistics), at(upstream), upstream_stride);
  }

 private:
  Problem at_addresses(uintptr_t student, uintptr_t teacher, uintptr_t student_gradient, uintptr_t teacher_gradient,
                       double scale, int threads) const {
    Problem problem = problem_;
    problem.student.data = at(student);
    problem.teacher.data = at(teacher);
    problem.student_gradient.data = at(student_gradient);
    problem.teacher_gradient.data = at(teacher_gradient);
    problem.scale = scale;
    problem.threads = threads;
    return problem;
  }

  Problem problem_;
};

}  // namespace

void bind_loss(py::module_& module) {
  py::class_<LossProblem>(module, "LossProblem")
      .def(py::init<const py::tuple&, int, const py::tuple&, const py::tuple&, int, const py::tuple&, const py::tuple&,
                    int, bool, double>())
      .def("forward", &LossProblem::forward)
      .def("backward", &LossProblem::backward);
}

}  // namespace ftfast
