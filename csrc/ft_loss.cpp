// The driver of the CPU loss: shares samples between threads, gathers samples that are not dense, and writes the
// per-sample numbers. All arithmetic over elements is in cpu/ft_loss.cpp.
#include "ft_loss.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <limits>
#include <memory>
#include <new>

#if defined(_OPENMP)
#include <omp.h>
#endif

#include "dtype.h"
#include "gather.h"

namespace ftfast {
namespace {

int64_t bytes_of(DType dtype) {
  switch (dtype) {
    case DType::float64: return 8;
    case DType::float32: return 4;
    case DType::bfloat16: case DType::float16: return 2;
    default: return 1;
  }
}

template <class Run>
void with_element(DType dtype, Run run) {
  switch (bytes_of(dtype)) {
    case 8: return run(uint64_t());
    case 4: return run(uint32_t());
    case 2: return run(uint16_t());
    default: return run(uint8_t());
  }
}

double value_at(const void* row, DType dtype, int64_t i) {
  switch (dtype) {
    case DType::float64: return static_cast<const double*>(row)[i];
    case DType::float32: return static_cast<const float*>(row)[i];
    case DType::bfloat16: return to_float(static_cast<const BFloat16*>(row)[i]);
    case DType::float16: return to_float(static_cast<const Float16*>(row)[i]);
    case DType::int8: return static_cast<const int8_t*>(row)[i];
    default: return to_float(static_cast<const Float8*>(row)[i]);
  }
}

void put_value(void* row, DType dtype, int64_t i, double value) {
  switch (dtype) {
    case DType::float64: static_cast<double*>(row)[i] = value; break;
    case DType::float32: static_cast<float*>(row)[i] = float(value); break;
    case DType::bfloat16: static_cast<BFloat16*>(row)[i] = to_bfloat16(float(value)); break;
    default: static_cast<Float16*>(row)[i] = to_float16(float(value)); break;
  }
}

// A sample's memory while one thread works on it: gathered where it is not dense, converted where no kernel reads its
// dtype (float8, and whatever meets a float64). Two samples can be held at once, n and n + 1.
class RowBuffer {
 public:
  RowBuffer(const Problem& problem, const Factor& factor, DType read_as)
      : problem_(problem), factor_(factor), read_as_(read_as) {
    for (int i = 0; i < 2; ++i) {
      if (!factor.dense) gathered_[i] = allocate(problem.size * bytes_of(factor.dtype));
      if (read_as != factor.dtype) converted_[i] = allocate(problem.size * bytes_of(read_as));
    }
  }

  const void* read(int64_t n) {
    const char* row = sample(n);
    if (!factor_.dense) {
      with_element(factor_.dtype, [&](auto element) {
        using E = decltype(element);
        gather(reinterpret_cast<E*>(gathered_[n & 1].get()), reinterpret_cast<const E*>(row), problem_.sizes,
               factor_.strides, problem_.dims);
      });
      row = gathered_[n & 1].get();
    }
    if (read_as_ == factor_.dtype) return row;
    char* values = converted_[n & 1].get();
    for (int64_t i = 0; i < problem_.size; ++i) put_value(values, read_as_, i, value_at(row, factor_.dtype, i));
    return values;
  }

  // Where a kernel may write sample n; finish(n) puts it in its place.
  void* target(int64_t n) {
    if (read_as_ != factor_.dtype) return converted_[n & 1].get();
    return factor_.dense ? sample(n) : gathered_[n & 1].get();
  }

  void finish(int64_t n) {
    char* row = factor_.dense ? sample(n) : gathered_[n & 1].get();
    if (read_as_ != factor_.dtype)
      for (int64_t i = 0; i < problem_.size; ++i)
        put_value(row, factor_.dtype, i, value_at(converted_[n & 1].get(), read_as_, i));
    if (factor_.dense) return;
    with_element(factor_.dtype, [&](auto element) {
      using E = decltype(element);
      scatter(reinterpret_cast<E*>(sample(n)), reinterpret_cast<const E*>(row), problem_.sizes, factor_.strides,
              problem_.dims);
    });
  }

 private:
  struct Free {
    void operator()(char* memory) const { std::free(memory); }
  };
  using Memory = std::unique_ptr<char, Free>;

  static Memory allocate(int64_t bytes) {
    // Whole registers from an aligned start, as the kernels like it.
    char* memory = static_cast<char*>(std::aligned_alloc(64, size_t(bytes + 63) / 64 * 64));
    if (!memory) throw std::bad_alloc();
    return Memory(memory);
  }

  char* sample(int64_t n) const { return factor_.data + n * factor_.sample_stride * bytes_of(factor_.dtype); }

  const Problem& problem_;
  const Factor& factor_;
  DType read_as_;
  Memory gathered_[2], converted_[2];
};

// From here on a gradient is written past the caches: measured faster from 6.4 MB, with
// a reader after it too, and slower up to 4.8 MB (2 cores with 1 MB of L2 each).
constexpr int64_t past_caches_bytes = int64_t(6) << 20;

// Elements that are worth a second thread: waking one costs microseconds.
constexpr int64_t elements_per_thread = 16384;

// body(first, last) on each thread: a contiguous share of the samples.
template <class Body>
void share_samples(const Problem& problem, Body body) {
  bool out_of_memory = false;  // an exception must not leave a parallel region
#if defined(_OPENMP)
  const int64_t worthwhile = problem.samples * problem.size / elements_per_thread;
  const int threads = int(std::max<int64_t>(1, std::min<int64_t>({problem.threads, problem.samples, worthwhile})));
#pragma omp parallel num_threads(threads)
  {
    const int64_t workers = omp_get_num_threads(), worker = omp_get_thread_num();
#else
  {
    const int64_t workers = 1, worker = 0;
#endif
    try {
      body(problem.samples * worker / workers, problem.samples * (worker + 1) / workers);
    } catch (const std::bad_alloc&) {
      out_of_memory = true;
    }
  }
  if (out_of_memory) throw std::bad_alloc();
}

bool in_double(const Problem& problem) {
  return problem.student.dtype == DType::float64 || problem.teacher.dtype == DType::float64;
}

DType read_as(const Problem& problem, DType dtype) {
  if (in_double(problem)) return DType::float64;
  return dtype == DType::float8_e4m3fn ? DType::float32 : dtype;
}

template <class C>
struct Norm {
  C inverse;
  bool clamped;
  Norm(double squares, double eps) {
    const C norm = std::sqrt(C(squares)), floor = C(eps);
    clamped = norm < floor;  // false for NaN, which must come through
    const C divisor = clamped ? floor : norm;
    inverse = C(1) / divisor;
    // A floor so small that its inverse overflows must still send a zero row to zero.
    if (divisor > 0 && inverse > std::numeric_limits<C>::max()) inverse = std::numeric_limits<C>::max();
  }
};

// The numbers with which a row kernel writes the gradient of one side: x is that side, y the other.
struct Direction {
  double r, h, k, c;
};

Direction direction(int p, double xi, double yi, double product, double h, double scale) {
  // A side whose norm overflowed has direction 0 and gradient 0; its units are of no use.
  if (xi == 0) return {0, 0, product * 0, 0};
  return {yi / xi, p == 1 ? 1 : h * xi, product * xi, scale * xi};
}

template <class C>
void forward(const Problem& problem, C* loss, C* statistics) {
  const int64_t samples = problem.samples, size = problem.size;
  const DType student_as = read_as(problem, problem.student.dtype), teacher_as = read_as(problem, problem.teacher.dtype);
  const RowKernels row = row_kernels(student_as, teacher_as), exchanged = row_kernels(teacher_as, student_as);
  using limits = std::numeric_limits<C>;
  const bool with_gradient = problem.student_gradient.data != nullptr;
  const bool past_caches = samples * size * bytes_of(problem.student.dtype) >= past_caches_bytes;
  share_samples(problem, [&](int64_t first, int64_t last) {
    RowBuffer student(problem, problem.student, student_as), teacher(problem, problem.teacher, teacher_as);
    RowBuffer target(problem, with_gradient ? problem.student_gradient : problem.student, student_as);
    double squares[2], sums[2];
    const void *s = nullptr, *t = nullptr, *next_s = nullptr, *next_t = nullptr;
    for (int64_t n = first; n < last; ++n, s = next_s, t = next_t) {
      if (n == first || !with_gradient) {
        s = student.read(n);
        t = teacher.read(n);
        row.squares(s, t, size, squares);
      }
      const Norm<C> s_norm(squares[0], problem.eps), t_norm(squares[1], problem.eps);
      const double si = s_norm.inverse, ti = t_norm.inverse;
      const double r = ti / si;
      // In units of the student's norm, unless its square overflowed (a is then 0, as in the reference), or squares of
      // differences would overflow or vanish in them.
      const bool overflowed = si == 0;
      const bool squares_fail = problem.p == 2 && (squares[0] > limits::max() / 8 || si > 1 / (16 * std::sqrt(limits::min())));
      const bool exchange = (overflowed || squares_fail) && exchanged.distances != nullptr;
      if (exchange) exchanged.distances(t, s, size, problem.p, si / ti, sums);
      else row.distances(s, t, size, problem.p, r, sums);
      const double unit = exchange ? ti : si;
      double value = sums[0] * unit, h = 1;
      if (problem.p == 2) {
        value = std::sqrt(sums[0]) * unit;
        h = value > 0 ? 1 / value : value;  // 0 stays 0, NaN stays NaN
      }
      // <g, a>, and -<g, b> from it, since l = <g, a - b>; exchanged sums hold -<g, b> first
      const double first = sums[1] * unit * (problem.p == 2 ? unit * h : 1);
      const double q = exchange ? value - first : first;
      const C student_product = s_norm.clamped ? C(0) : C(q);
      if (statistics) {
        statistics[n] = s_norm.inverse;
        statistics[samples + n] = t_norm.inverse;
        statistics[2 * samples + n] = student_product;
        statistics[3 * samples + n] = t_norm.clamped ? C(0) : C(value - q);
        statistics[4 * samples + n] = C(h);
      }
      loss[n] = C(value);
      if (with_gradient) {
        const Direction to = direction(problem.p, si, ti, student_product, h, problem.scale);
        if (n + 1 < last) {
          next_s = student.read(n + 1);
          next_t = teacher.read(n + 1);
          row.gradient_and_next_squares(s, t, target.target(n), size, problem.p, to.r, to.h, to.k, to.c, next_s, next_t,
                                        squares, past_caches);
        } else {
          row.gradient(s, t, target.target(n), size, problem.p, to.r, to.h, to.k, to.c);
        }
        target.finish(n);
      }
    }
  });
}

template <class C>
void forward_and_reduce(const Problem& problem, C* loss, C* statistics) {
  if (!problem.mean_of_rows) {
    forward(problem, loss, statistics);
    for (int64_t n = 0; n < problem.samples; ++n) loss[n] = C(loss[n] * problem.scale);
    return;
  }
  std::unique_ptr<C[]> rows(new C[problem.samples]);
  forward(problem, rows.get(), statistics);
  double total = 0;
  for (int64_t n = 0; n < problem.samples; ++n) total += rows[n];
  *loss = C(total * problem.scale);
}

template <class C>
void backward(const Problem& problem, const C* statistics, const C* upstream, int64_t upstream_stride) {
  const int64_t samples = problem.samples, size = problem.size;
  const DType student_as = read_as(problem, problem.student.dtype), teacher_as = read_as(problem, problem.teacher.dtype);
  const bool for_student = problem.student_gradient.data, for_teacher = problem.teacher_gradient.data;
  const RowKernels row = row_kernels(student_as, teacher_as), exchanged = row_kernels(teacher_as, student_as);
  share_samples(problem, [&](int64_t first, int64_t last) {
    RowBuffer student(problem, problem.student, student_as), teacher(problem, problem.teacher, teacher_as);
    RowBuffer student_target(problem, for_student ? problem.student_gradient : problem.student, student_as);
    RowBuffer teacher_target(problem, for_teacher ? problem.teacher_gradient : problem.teacher, teacher_as);
    for (int64_t n = first; n < last; ++n) {
      const void *s = student.read(n), *t = teacher.read(n);
      const double si = statistics[n], ti = statistics[samples + n], h = statistics[4 * samples + n];
      const double scale = problem.scale * upstream[n * upstream_stride];
      const Direction to = direction(problem.p, si, ti, statistics[2 * samples + n], h, scale);
      if (for_student) {
        row.gradient(s, t, student_target.target(n), size, problem.p, to.r, to.h, to.k, to.c);
        student_target.finish(n);
      }
      if (for_teacher && si == 0) {  // in the teacher's own units
        const Direction own = direction(problem.p, ti, si, statistics[3 * samples + n], h, scale);
        exchanged.gradient(t, s, teacher_target.target(n), size, problem.p, own.r, own.h, own.k, own.c);
        teacher_target.finish(n);
      } else if (for_teacher) {  // g has the other sign there
        row.teacher_gradient(s, t, teacher_target.target(n), size, problem.p, to.r, -to.h,
                             statistics[3 * samples + n] * ti, scale * ti);
        teacher_target.finish(n);
      }
    }
  });
}

}  // namespace

void ft_loss_forward(const Problem& problem, void* loss, void* statistics) {
  if (in_double(problem)) forward_and_reduce(problem, static_cast<double*>(loss), static_cast<double*>(statistics));
  else forward_and_reduce(problem, static_cast<float*>(loss), static_cast<float*>(statistics));
}

void ft_loss_backward(const Problem& problem, const void* statistics, const void* upstream, int64_t upstream_stride) {
  if (in_double(problem))
    backward(problem, static_cast<const double*>(statistics), static_cast<const double*>(upstream), upstream_stride);
  else
    backward(problem, static_cast<const float*>(statistics), static_cast<const float*>(upstream), upstream_stride);
}

}  // namespace ftfast
