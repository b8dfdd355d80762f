// How a launch of the loss's kernels is cut up, and which part of it a block has.
#pragma once

#include <algorithm>
#include <cstdint>
#include <stdexcept>

#include "element.h"
#include "ft_loss.h"
#include "ft_loss_rows.h"

namespace ftfast::cuda {

constexpr int warp_size = 32;

// Where a sample of rows starts, or null.
template <class Element>
FTFAST_BOTH Element* sample_of(const Rows& rows, int64_t n) {
  return rows.data ? static_cast<Element*>(rows.data) + n * rows.stride : nullptr;
}

struct ForwardPlan {
  int threads;
  bool aligned;         // every vector of every sample is
  int blocks;           // of each sample; where more than one, they are a cluster
  int64_t run;          // elements of a block
  int teacher_offset;   // bytes from the student's staged run to the teacher's
  int shared_bytes;     // 0: the samples are read from global memory, twice
};

struct BackwardPlan {
  int threads;
  bool aligned;
  int64_t blocks;       // of each sample
  int64_t run;          // elements of a block
};

// What a device has for a forward launch; shared memory in bytes of a block.
struct Limits {
  int64_t shared;             // at most
  int64_t shared_of_several;  // where blocks_at_once of them are to share a multiprocessor
  bool clusters;
};

constexpr int largest_block = 512;
constexpr int backward_block = 256;
constexpr int vectors_a_thread = 2;

constexpr int largest_cluster = 8;  // what every device that has clusters can launch

// Forward's blocks on a multiprocessor, so that some read while others compute. Doubles would spill with three.
template <class Number>
constexpr int blocks_at_once = sizeof(Number) == 8 ? 2 : 3;

inline int64_t blocks_of(int64_t size, int64_t block) { return (size + block - 1) / block; }

// How much of a sample is left for a block whose part starts there.
FTFAST_BOTH int64_t run_at(int64_t start, int64_t run, int64_t size) {
  const int64_t rest = size > start ? size - start : 0;
  return rest < run ? rest : run;
}

template <int width, class Element>
bool vectors_align(const Rows& rows) {
  const uint64_t bytes = width * sizeof(Element);
  return reinterpret_cast<uintptr_t>(rows.data) % bytes == 0 && uint64_t(rows.stride) * sizeof(Element) % bytes == 0;
}

inline int whole_warps(int64_t threads, int64_t most) {
  return int(std::min(blocks_of(threads, warp_size) * warp_size, most));
}

// As few blocks of a sample as leave room for others beside them; where not even the largest cluster does, that one, and
// two passes where it does not hold the sample.
template <class Student, class Teacher>
ForwardPlan plan_forward(const Forward& job, const Limits& limits) {
  constexpr int width = width_of<Student, Teacher>;
  const int64_t vectors = blocks_of(job.size, width);
  ForwardPlan plan;
  plan.aligned = vectors_align<width, Student>(job.student) && vectors_align<width, Teacher>(job.teacher);
  plan.blocks = 1;
  plan.run = job.size;
  plan.shared_bytes = plan.teacher_offset = 0;
  const int most = limits.clusters ? largest_cluster : 1;
  for (int blocks = 1; blocks <= most; blocks *= 2) {
    const int64_t run = blocks == 1 ? job.size : blocks_of(vectors, blocks) * width;
    const int64_t student_bytes = blocks_of(run * sizeof(Student), vector_bytes) * vector_bytes;
    const int64_t bytes = student_bytes + int64_t(run * sizeof(Teacher));
    if (bytes > (blocks < most ? limits.shared_of_several : limits.shared)) continue;
    plan.blocks = blocks;
    plan.run = run;
    plan.teacher_offset = int(student_bytes);
    plan.shared_bytes = int(bytes);
    break;
  }
  plan.threads = whole_warps(blocks_of(plan.run, width * vectors_a_thread), largest_block);
  return plan;
}

template <class Student, class Teacher>
BackwardPlan plan_backward(const Backward& job) {
  constexpr int width = width_of<Student, Teacher>;
  BackwardPlan plan;
  plan.aligned = vectors_align<width, Student>(job.student) && vectors_align<width, Teacher>(job.teacher) &&
                 vectors_align<width, Student>(job.student_gradient) &&
                 vectors_align<width, Teacher>(job.teacher_gradient);
  const int64_t vectors = blocks_of(job.size, width);
  plan.blocks = blocks_of(vectors, backward_block * vectors_a_thread);
  plan.run = blocks_of(vectors, plan.blocks) * width;
  plan.threads = whole_warps(blocks_of(plan.run, width), backward_block);
  return plan;
}

// What a thread of block number `block` of the whole launch does.
template <class Student, class Teacher>
FTFAST_BOTH void backward_block_part(Thread thread, const Backward& job, const BackwardPlan& plan, int64_t block) {
  const int64_t n = block / plan.blocks, start = block % plan.blocks * plan.run;
  Student* student_gradient = sample_of<Student>(job.student_gradient, n);
  Teacher* teacher_gradient = sample_of<Teacher>(job.teacher_gradient, n);
  write_gradients(thread, run_at(start, plan.run, job.size), plan.aligned, Gradients<NumberFor<Student>>(job, n),
                  sample_of<const Student>(job.student, n) + start, sample_of<const Teacher>(job.teacher, n) + start,
                  student_gradient ? student_gradient + start : nullptr,
                  teacher_gradient ? teacher_gradient + start : nullptr);
}

// run(Student(), Teacher()) with the element types of the factors
template <class Run>
void with_types(DType student, DType teacher, Run run) {
  const auto with_teacher = [&](auto s) {
    switch (teacher) {
      case DType::float32: return run(s, float());
      case DType::bfloat16: return run(s, BFloat16());
      case DType::float16: return run(s, Float16());
      case DType::int8: return run(s, int8_t());
      case DType::float8_e4m3fn: return run(s, Float8());
      case DType::float64: break;
    }
    throw std::logic_error("a float64 factor meets another dtype");
  };
  switch (student) {
    case DType::float32: return with_teacher(float());
    case DType::bfloat16: return with_teacher(BFloat16());
    case DType::float16: return with_teacher(Float16());
    case DType::float64:
      if (teacher != DType::float64) throw std::logic_error("a float64 factor meets another dtype");
      return run(double(), double());
    case DType::int8: case DType::float8_e4m3fn: break;
  }
  throw std::logic_error("no student has this dtype");
}

// run(Student(), Teacher()) for each pair that has kernels
template <class Run>
void with_every_type(Run run) {
  for (const DType student : {DType::float32, DType::bfloat16, DType::float16})
    for (const DType teacher : {DType::float32, DType::bfloat16, DType::float16, DType::int8, DType::float8_e4m3fn})
      with_types(student, teacher, run);
  run(double(), double());
}

}  // namespace ftfast::cuda
