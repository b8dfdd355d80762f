// The driver of the CPU loss: shares samples between threads, gathers samples that are not dense, and writes the
// per-sample numbers. All arithmetic over elements is in cpu/ft_loss.cpp.
#include "ft_loss.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <new>

#if defined(_OPENMP)
#include <omp.h>
#endif

#include "caches.h"
#include "rows/row_buffer.h"
#include "rows/sample_directions.h"

namespace ftfast {
namespace {

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

bool goes_past_caches(const Problem& problem, const Factor& gradient) {
  return gradient.dense && gradient.dtype == DType::float32 &&
         problem.samples * problem.size * bytes_of(gradient.dtype) >= past_caches_bytes;
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
  using limits = std::numeric_limits<C>;
  C inverse;
  bool clamped;
  Norm(double squares, double eps) {
    // Squares beyond the range of C are infinite, and the direction is 0, as in the reference.
    const C norm = C(std::sqrt(squares > limits::max() ? double(limits::infinity()) : squares));
    // The reciprocal of a subnormal floor would be infinite.
    const C floor = eps > 0 ? std::max(C(eps), limits::min()) : C(0);
    clamped = norm <= floor;  // false for NaN, which must come through
    const C divisor = clamped ? floor : norm;
    inverse = C(1) / divisor;
    // The inverse of a subnormal norm must not be infinite.
    if (divisor > 0 && inverse > limits::max()) inverse = limits::max();
  }
};

// How far from 0 a sum may be for arithmetic in C to hold. Squares and products of which a C keeps fewer digits, or none,
// are then too small a part of it to count.
template <class C>
struct Range;
template <>
struct Range<float> {
  static constexpr double least = 0x1p-100, most = 0x1p126;
};
template <>
struct Range<double> {
  static constexpr double least = 0x1p-900, most = 0x1p1022;
};

// Written so that a NaN is not within.
template <class C>
bool holds(double sum, double parts) {
  return sum >= Range<C>::least * parts && sum <= Range<C>::most;
}

// Whether C holds the numbers with which a row kernel walks a sample in units of the student's norm. What does not is
// seldom: an infinite or a NaN norm, a zero row under a tiny eps, factors of very unlike sizes, equal factors.
template <class C>
bool fits(double si, double ti) {
  const double ratio = ti / si;
  return ratio >= std::numeric_limits<C>::min() && ratio <= Range<C>::most && si >= 1 / std::sqrt(Range<C>::most) &&
         si <= 1 / Range<C>::least;
}

template <class C>
bool fits_gradient(int p, int64_t size, double si, double ti, double distance, double scale) {
  const double units = distance / si;
  return fits<C>(si, ti) && std::fabs(scale) * std::fmax(si, ti) <= Range<C>::most &&
         (p == 1 || holds<C>(units * units, double(size)));
}

// What the sums of a sample give: l, <g, a> and -<g, b>.
struct Sample {
  double distance, student_product, teacher_product;
};

// For p=2, d times this is g: 0 where l is 0, and NaN where it is NaN.
double inverse_distance(int p, double distance) { return p == 1 ? 1 : distance > 0 ? 1 / distance : distance; }

// sums: of distances in units of a norm, the third where it was summed
Sample sample_of(int p, const double* sums, double unit, bool has_third) {
  if (p == 1) {
    const double value = sums[0] * unit, first = sums[1] * unit;
    return {value, first, has_third ? sums[2] * unit : value - first};
  }
  const double value = std::sqrt(sums[0]) * unit, h = inverse_distance(p, value);
  const double first = sums[1] * unit * (unit * h);
  return {value, first, has_third ? sums[2] * unit * (unit * h) : value - first};
}

template <class C>
void forward(const Problem& problem, C* loss, C* statistics) {
  const int64_t samples = problem.samples, size = problem.size;
  const int p = problem.p;
  const DType student_as = read_as(problem, problem.student.dtype), teacher_as = read_as(problem, problem.teacher.dtype);
  const RowKernels row = row_kernels(student_as, teacher_as);
  const bool with_gradient = problem.student_gradient.data != nullptr;
  const bool past_caches = goes_past_caches(problem, problem.student_gradient);
  const bool two_in_first_cache = 2 * size * (bytes_of(student_as) + bytes_of(teacher_as)) <= first_cache_bytes;
  // Below it a norm whose squares may have vanished is clamped all the same.
  const double sure_floor = std::sqrt(2 * Range<C>::least * double(size));
  share_samples(problem, [&](int64_t first, int64_t last) {
    RowBuffer student(problem, problem.student, student_as), teacher(problem, problem.teacher, teacher_as);
    RowBuffer target(problem, with_gradient ? problem.student_gradient : problem.student, student_as);
    Directions directions(problem);
    double sums[3];
    struct Read {
      const void *s = nullptr, *t = nullptr;
      double squares[2];
    } now, next;
    bool is_read = false;  // the next one, and its squares are summed
    const auto read_next = [&](int64_t n) {
      is_read = true;
      next.s = student.read(n + 1);
      next.t = teacher.read(n + 1);
    };
    for (int64_t n = first; n < last; ++n) {
      if (is_read) {
        now = next;
      } else {
        now.s = student.read(n);
        now.t = teacher.read(n);
        row.squares(now.s, now.t, size, now.squares);
      }
      is_read = false;
      next = Read();
      const void *s = now.s, *t = now.t;
      double* squares = now.squares;
      if (problem.eps < sure_floor) {
        if (squares[0] < Range<C>::least * double(size)) squares[0] = Directions::squares(s, student_as, size);
        if (squares[1] < Range<C>::least * double(size)) squares[1] = Directions::squares(t, teacher_as, size);
      }
      const Norm<C> s_norm(squares[0], problem.eps), t_norm(squares[1], problem.eps);
      const double si = s_norm.inverse, ti = t_norm.inverse;
      bool ordinary = fits<C>(si, ti);
      if (ordinary) {
        if (two_in_first_cache && n + 1 < last) read_next(n);
        row.distances(s, t, size, p, ti / si, sums, next.s, next.t, next.squares);
        ordinary = holds<C>(sums[0], double(size));
      }
      if (!ordinary) {
        directions.set(s, student_as, si, t, teacher_as, ti);
        directions.distances(sums);
      }
      const Sample it = sample_of(p, sums, ordinary ? si : 1, !ordinary);
      // In C, so that a gradient written now is bit-equal to one that backward writes from the statistics.
      const C distance = C(it.distance), student_product = s_norm.clamped ? C(0) : C(it.student_product);
      loss[n] = distance;
      if (statistics) {
        statistics[n] = s_norm.inverse;
        statistics[samples + n] = t_norm.inverse;
        statistics[2 * samples + n] = student_product;
        statistics[3 * samples + n] = t_norm.clamped ? C(0) : C(it.teacher_product);
        statistics[4 * samples + n] = ordinary ? distance : std::copysign(distance, C(-1));
      }
      if (!with_gradient) continue;
      const double h = inverse_distance(p, distance), scale = problem.scale * problem.upstream;
      if (!ordinary || !fits_gradient<C>(p, size, si, ti, distance, scale)) {
        if (ordinary) directions.set(s, student_as, si, t, teacher_as, ti);
        directions.student_gradient(target.target(n), student_as, h, student_product, scale * si);
      } else {
        const double along_d = p == 1 ? 1 : h * si, along_s = student_product * si;
        if (!is_read && n + 1 < last) {
          read_next(n);
          row.gradient_and_next_squares(s, t, target.target(n), size, p, ti / si, along_d, along_s, scale * si, next.s,
                                        next.t, next.squares, past_caches);
        } else {
          row.gradient(s, t, target.target(n), size, p, ti / si, along_d, along_s, scale * si, past_caches);
        }
      }
      target.finish(n);
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
  const int p = problem.p;
  const DType student_as = read_as(problem, problem.student.dtype), teacher_as = read_as(problem, problem.teacher.dtype);
  const bool for_student = problem.student_gradient.data, for_teacher = problem.teacher_gradient.data;
  if (for_teacher && bytes_of(problem.teacher.dtype) == 1) no_such_dtype();
  const bool student_past_caches = goes_past_caches(problem, problem.student_gradient);
  const bool teacher_past_caches = goes_past_caches(problem, problem.teacher_gradient);
  const RowKernels row = row_kernels(student_as, teacher_as);
  share_samples(problem, [&](int64_t first, int64_t last) {
    RowBuffer student(problem, problem.student, student_as), teacher(problem, problem.teacher, teacher_as);
    RowBuffer student_target(problem, for_student ? problem.student_gradient : problem.student, student_as);
    RowBuffer teacher_target(problem, for_teacher ? problem.teacher_gradient : problem.teacher, teacher_as);
    Directions directions(problem);
    for (int64_t n = first; n < last; ++n) {
      const void *s = student.read(n), *t = teacher.read(n);
      const double si = statistics[n], ti = statistics[samples + n], signed_distance = statistics[4 * samples + n];
      const double distance = std::fabs(signed_distance);
      const double student_product = statistics[2 * samples + n], teacher_product = statistics[3 * samples + n];
      const double h = inverse_distance(p, distance), scale = problem.scale * upstream[n * upstream_stride];
      const bool ordinary = !std::signbit(signed_distance) && fits_gradient<C>(p, size, si, ti, distance, scale);
      if (!ordinary) directions.set(s, student_as, si, t, teacher_as, ti);
      const double along_d = p == 1 ? 1 : h * si;
      if (for_student) {
        void* out = student_target.target(n);
        if (ordinary)
          row.gradient(s, t, out, size, p, ti / si, along_d, student_product * si, scale * si, student_past_caches);
        else directions.student_gradient(out, student_as, h, student_product, scale * si);
        student_target.finish(n);
      }
      if (for_teacher) {  // g has the other sign there
        void* out = teacher_target.target(n);
        if (ordinary)
          row.teacher_gradient(s, t, out, size, p, ti / si, -along_d, teacher_product * ti, scale * ti,
                               teacher_past_caches);
        else directions.teacher_gradient(out, teacher_as, h, teacher_product, scale * ti);
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
