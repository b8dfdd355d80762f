// What one thread of the loss's kernels does to its part of a sample. All of it compiles for the host too, where a test
// runs the threads of a block one after another.
//
// With a = s / max(|s|, eps) and b likewise of t:
//   p = 1:  l = sum |a - b|,        g = sign(a - b)
//   p = 2:  l = sqrt(sum (a-b)^2),  g = (a - b) / l, 0 where l = 0
//   ds = upstream * scale * (g - a <g, a>) / max(|s|, eps), without <g, a> where the norm is clamped; dt its mirror
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "element.h"
#include "ft_loss.h"

#if defined(__CUDACC__)
#include <cuda_pipeline.h>
#endif

namespace ftfast::cuda {

// One thread among those that share a sample; it visits the same elements in every pass.
struct Thread {
  int index, count;
};

// visit_vector(i) for each whole vector of elements i .. i + width, then visit_one(i) for each element that is left:
// the tail of a sample, and all of it where its vectors are not aligned.
template <int width, class Index, class VisitVector, class VisitOne>
FTFAST_BOTH void visit(Thread thread, Index size, bool aligned, VisitVector visit_vector, VisitOne visit_one) {
  const Index vectors = aligned ? size / width : 0;
  for (Index vector = thread.index; vector < vectors; vector += thread.count) visit_vector(vector * width);
  for (Index i = vectors * width + thread.index; i < size; i += thread.count) visit_one(i);
}

// add(x, y) for each pair of elements
template <class Index, class Student, class Teacher, class Add>
FTFAST_BOTH void visit_pairs(Thread thread, Index size, bool aligned, const Student* student, const Teacher* teacher,
                             Add add) {
  using Number = NumberFor<Student>;
  constexpr int width = width_of<Student, Teacher>;
  visit<width>(
      thread, size, aligned,
      [&](Index i) {
        const auto x = read_vector<width>(student + i);
        const auto y = read_vector<width>(teacher + i);
        for (int k = 0; k < width; ++k) add(Number(wide(x.values[k])), Number(wide(y.values[k])));
      },
      [&](Index i) { add(Number(wide(student[i])), Number(wide(teacher[i]))); });
}

// Copies a thread's elements to shared memory. Only this thread reads them there, so no other one has to wait.
template <class Student, class Teacher>
FTFAST_BOTH void stage(Thread thread, int size, bool aligned, const Student* student, const Teacher* teacher,
                       Student* staged_student, Teacher* staged_teacher) {
  constexpr int width = width_of<Student, Teacher>;
  visit<width>(
      thread, size, aligned,
      [&](int i) {
#if defined(__CUDA_ARCH__)
        __pipeline_memcpy_async(staged_student + i, student + i, width * sizeof(Student));
        __pipeline_memcpy_async(staged_teacher + i, teacher + i, width * sizeof(Teacher));
#else
        std::memcpy(staged_student + i, student + i, width * sizeof(Student));
        std::memcpy(staged_teacher + i, teacher + i, width * sizeof(Teacher));
#endif
      },
      [&](int i) {
        staged_student[i] = student[i];
        staged_teacher[i] = teacher[i];
      });
#if defined(__CUDA_ARCH__)
  __pipeline_commit();
  __pipeline_wait_prior(0);
#endif
}

// Sums that every thread has a part of.
template <class Number, int size>
struct Sums {
  static constexpr int count = size;
  Number values[size] = {};
};

// What a thread adds up before its sums are folded into double: a longer run of equal numbers is rounded the same way
// each time. A sample in shared memory is no longer than that.
constexpr int64_t fold_vectors = 16;

// sums_of(size, first element) over a sample that is not in shared memory
template <int count, class Number, int width, class SumsOf>
FTFAST_BOTH Sums<Number, count> folded(Thread thread, int64_t size, SumsOf sums_of) {
  const int64_t run = fold_vectors * width * thread.count;
  Sums<double, count> total;
  for (int64_t start = 0; start < size; start += run) {
    const Sums<Number, count> part = sums_of(size - start < run ? size - start : run, start);
    for (int k = 0; k < count; ++k) total.values[k] += part.values[k];
  }
  Sums<Number, count> sums;
  for (int k = 0; k < count; ++k) sums.values[k] = Number(total.values[k]);
  return sums;
}

// |s|^2 and |t|^2
template <class Index, class Student, class Teacher>
FTFAST_BOTH auto squares(Thread thread, Index size, bool aligned, const Student* student, const Teacher* teacher) {
  using Number = NumberFor<Student>;
  const auto sums_of = [&](Index count, Index first) {
    Sums<Number, 2> sums;
    visit_pairs(thread, count, aligned, student + first, teacher + first, [&](Number x, Number y) {
      sums.values[0] += x * x;
      sums.values[1] += y * y;
    });
    return sums;
  };
  if constexpr (sizeof(Index) == 8) return folded<2, Number, width_of<Student, Teacher>>(thread, size, sums_of);
  else return sums_of(size, 0);
}

template <class Number>
struct Norms {
  Number student_inverse, teacher_inverse;
  bool student_clamped, teacher_clamped;
};

template <class Number>
FTFAST_BOTH Norms<Number> norms_of(const Sums<Number, 2>& squares, Number floor) {
  const Number student = std::sqrt(squares.values[0]), teacher = std::sqrt(squares.values[1]);
  Norms<Number> norms;
  // Written so that a NaN stays one.
  norms.student_clamped = student <= floor;
  norms.teacher_clamped = teacher <= floor;
  norms.student_inverse = 1 / (norms.student_clamped ? floor : student);
  norms.teacher_inverse = 1 / (norms.teacher_clamped ? floor : teacher);
  return norms;
}

// g; for p = 2 times l
template <class Number>
FTFAST_BOTH Number direction(Number difference, int p) {
  const Number sign = difference > 0 ? Number(1) : difference < 0 ? Number(-1) : Number(0);
  return p == 1 ? sign : difference;
}

// l, <g, a> and <g, b>; for p = 2 each times l
template <class Index, class Student, class Teacher>
FTFAST_BOTH auto distances(Thread thread, Index size, bool aligned, const Student* student, const Teacher* teacher,
                           const Norms<NumberFor<Student>>& norms, int p) {
  using Number = NumberFor<Student>;
  const auto sums_of = [&](Index count, Index first) {
    Sums<Number, 3> sums;
    visit_pairs(thread, count, aligned, student + first, teacher + first, [&](Number x, Number y) {
      const Number a = product(x, norms.student_inverse), b = product(y, norms.teacher_inverse);
      const Number difference = a - b, g = direction(difference, p);
      sums.values[0] += g * difference;
      sums.values[1] += g * a;
      sums.values[2] += g * b;
    });
    return sums;
  };
  if constexpr (sizeof(Index) == 8) return folded<3, Number, width_of<Student, Teacher>>(thread, size, sums_of);
  else return sums_of(size, 0);
}

template <class Number>
FTFAST_BOTH Number inverse_distance(Number distance, int p) {
  // Where l is 0 there is no direction, even where small differences are not 0.
  return p == 1 ? Number(1) : distance == 0 ? Number(0) : 1 / distance;
}

template <class Number, class Job>
FTFAST_BOTH Number factor_of(const Job& job) {
  const Number scale = Number(job.scale);
  return job.weight ? scale * *static_cast<const Number*>(job.weight) : scale;
}

// Writes what is known of sample n once its sums are.
template <class Number>
FTFAST_BOTH void finish_sample(const Forward& job, int64_t n, const Norms<Number>& norms,
                               const Sums<Number, 3>& sums) {
  Number* statistics = static_cast<Number*>(job.statistics) + n;
  const Number distance = job.p == 1 ? sums.values[0] : std::sqrt(sums.values[0]);
  const Number inverse = inverse_distance(distance, job.p);
  statistics[0] = norms.student_inverse;
  statistics[job.samples] = norms.teacher_inverse;
  statistics[2 * job.samples] = norms.student_clamped ? Number(0) : sums.values[1] * inverse;
  statistics[3 * job.samples] = norms.teacher_clamped ? Number(0) : sums.values[2] * inverse;
  statistics[4 * job.samples] = distance;
  if (job.per_sample) static_cast<Number*>(job.loss)[n] = distance * factor_of<Number>(job);
}

// This thread's part of the sum of l over the samples.
template <class Number>
FTFAST_BOTH Sums<Number, 1> total(Thread thread, const Forward& job) {
  const Number* distances = static_cast<const Number*>(job.statistics) + 4 * job.samples;
  Sums<Number, 1> sum;
  for (int64_t n = thread.index; n < job.samples; n += thread.count) sum.values[0] += fresh(distances + n);
  return sum;
}

// What backward needs of a sample.
template <class Number>
struct Gradients {
  Number student_inverse, teacher_inverse, student_product, teacher_product, inverse_distance, factor;
  int p;

  FTFAST_BOTH Gradients(const Backward& job, int64_t n) : p(job.p) {
    const Number* statistics = static_cast<const Number*>(job.statistics) + n;
    student_inverse = statistics[0];
    teacher_inverse = statistics[job.samples];
    student_product = statistics[2 * job.samples];
    teacher_product = statistics[3 * job.samples];
    inverse_distance = cuda::inverse_distance(statistics[4 * job.samples], p);
    // The upstream gradient, the weight and the reduction meet here, before the one rounding to the factor's dtype.
    factor = static_cast<const Number*>(job.upstream)[n * job.upstream_stride] * factor_of<Number>(job);
  }

  FTFAST_BOTH void at(Number x, Number y, Number& student, Number& teacher) const {
    const Number a = product(x, student_inverse), b = product(y, teacher_inverse);
    const Number g = direction(a - b, p) * inverse_distance;
    student = (g - a * student_product) * (factor * student_inverse);
    teacher = (b * teacher_product - g) * (factor * teacher_inverse);
  }
};

// Writes the gradients of a run of elements within a sample; every pointer is to its first one.
template <class Student, class Teacher>
FTFAST_BOTH void write_gradients(Thread thread, int64_t size, bool aligned,
                                 const Gradients<NumberFor<Student>>& gradients, const Student* student,
                                 const Teacher* teacher, Student* student_gradient, Teacher* teacher_gradient) {
  using Number = NumberFor<Student>;
  constexpr int width = width_of<Student, Teacher>;
  const auto element = [&](const Student& x, const Teacher& y, Student& for_student, Teacher& for_teacher) {
    Number ds, dt;
    gradients.at(wide(x), wide(y), ds, dt);
    round_to(for_student, ds);
    if constexpr (takes_gradient<Teacher>) round_to(for_teacher, dt);
  };
  visit<width>(
      thread, size, aligned,
      [&](int64_t i) {
        const auto x = read_vector<width>(student + i);
        const auto y = read_vector<width>(teacher + i);
        Vector<Student, width> for_student;
        Vector<Teacher, width> for_teacher;
        for (int k = 0; k < width; ++k) element(x.values[k], y.values[k], for_student.values[k], for_teacher.values[k]);
        if (student_gradient) write_vector(student_gradient + i, for_student);
        if constexpr (takes_gradient<Teacher>)
          if (teacher_gradient) write_vector(teacher_gradient + i, for_teacher);
      },
      [&](int64_t i) {
        Student for_student;
        Teacher for_teacher;
        element(student[i], teacher[i], for_student, for_teacher);
        if (student_gradient) student_gradient[i] = for_student;
        if constexpr (takes_gradient<Teacher>)
          if (teacher_gradient) teacher_gradient[i] = for_teacher;
      });
}

}  // namespace ftfast::cuda
