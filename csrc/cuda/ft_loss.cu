// The loss's kernels and their launches. Forward: one block owns one sample, and reads it once into shared memory. A
// sample too long for that is shared by a cluster of blocks, where the device has clusters and eight blocks are enough;
// else it is read twice from global memory. The block that arrives last adds up the samples in a fixed order, so a
// result is bit-equal from run to run. Backward reads both factors once more.
#include "ft_loss.h"

#include <cooperative_groups.h>
#include <cuda_runtime.h>

#include <mutex>
#include <stdexcept>
#include <string>
#include <utility>

#include "ft_loss_plan.h"
#include "ft_loss_rows.h"

namespace ftfast::cuda {
namespace {

// The total over all threads of a block, the same bits in each: within warps, then over the warps' sums.
template <class Number, int count>
__device__ Sums<Number, count> over_block(Sums<Number, count> sums) {
  __shared__ Number warps[count][largest_block / warp_size];
  const int lane = threadIdx.x % warp_size, warp = threadIdx.x / warp_size, active = blockDim.x / warp_size;
  for (int k = 0; k < count; ++k) {
    for (int step = warp_size / 2; step > 0; step /= 2) sums.values[k] += __shfl_xor_sync(~0u, sums.values[k], step);
    if (lane == 0) warps[k][warp] = sums.values[k];
  }
  __syncthreads();
  for (int k = 0; k < count; ++k) {
    sums.values[k] = lane < active ? warps[k][lane] : Number(0);
    for (int step = warp_size / 2; step > 0; step /= 2) sums.values[k] += __shfl_xor_sync(~0u, sums.values[k], step);
  }
  return sums;
}

__device__ void wait_for_cluster() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  cooperative_groups::this_cluster().sync();
#endif
}

// The total over the blocks that share a sample, from each block's own. None may exit before the others have read.
template <class Number, int count>
__device__ Sums<Number, count> over_sample(Sums<Number, count> sums, int blocks) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  if (blocks == 1) return sums;
  __shared__ Number own[count];
  if (threadIdx.x == 0)
    for (int k = 0; k < count; ++k) own[k] = sums.values[k];
  wait_for_cluster();
  const auto cluster = cooperative_groups::this_cluster();
  sums = {};
#pragma unroll 1  // eight at once would take registers from every launch without clusters
  for (int rank = 0; rank < blocks; ++rank)
    for (int k = 0; k < count; ++k) sums.values[k] += cluster.map_shared_rank(own, rank)[k];
#endif
  return sums;
}

template <class Number, class Index, class Student, class Teacher>
__device__ void forward_sample(const Forward& job, const ForwardPlan& plan, Index size, const Student* student,
                               const Teacher* teacher) {
  const Thread thread{int(threadIdx.x), int(blockDim.x)};
  const auto own_squares = over_block(squares(thread, size, plan.aligned, student, teacher));
  const auto norms = norms_of(over_sample(own_squares, plan.blocks), Number(job.eps));
  const auto own_sums = over_block(distances(thread, size, plan.aligned, student, teacher, norms, job.p));
  const auto sums = over_sample(own_sums, plan.blocks);
  if (thread.index == 0 && blockIdx.x % plan.blocks == 0) finish_sample(job, blockIdx.x / plan.blocks, norms, sums);
}

template <class Student, class Teacher>
__global__ void __launch_bounds__(largest_block, blocks_at_once<NumberFor<Student>>)
    forward_kernel(const Forward job, const ForwardPlan plan) {
  using Number = NumberFor<Student>;
  extern __shared__ uint4 shared[];
  const Thread thread{int(threadIdx.x), int(blockDim.x)};
  const int64_t n = blockIdx.x / plan.blocks, start = blockIdx.x % plan.blocks * plan.run;
  const Student* student = sample_of<const Student>(job.student, n) + start;
  const Teacher* teacher = sample_of<const Teacher>(job.teacher, n) + start;
  if (plan.shared_bytes) {
    const int size = int(run_at(start, plan.run, job.size));
    Student* staged_student = reinterpret_cast<Student*>(shared);
    Teacher* staged_teacher = reinterpret_cast<Teacher*>(reinterpret_cast<char*>(shared) + plan.teacher_offset);
    stage(thread, size, plan.aligned, student, teacher, staged_student, staged_teacher);
    forward_sample<Number>(job, plan, size, staged_student, staged_teacher);
    if (plan.blocks > 1) wait_for_cluster();
  } else {
    forward_sample<Number>(job, plan, job.size, student, teacher);
  }
  if (job.per_sample || start) return;

  __shared__ bool last;
  if (thread.index == 0) {
    __threadfence();  // this sample's l, before the count that releases it
    last = atomicAdd(job.counter, 1) == int(job.samples) - 1;
  }
  __syncthreads();
  if (!last) return;
  __threadfence();
  const auto sum = over_block(total<Number>(thread, job));
  if (thread.index == 0) {
    *static_cast<Number*>(job.loss) = sum.values[0] * factor_of<Number>(job);
    *job.counter = 0;
  }
}

template <class Student, class Teacher>
__global__ void __launch_bounds__(backward_block) backward_kernel(const Backward job, const BackwardPlan plan) {
  backward_block_part<Student, Teacher>({int(threadIdx.x), int(blockDim.x)}, job, plan, blockIdx.x);
}

void check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // so that no later launch reports it again
  throw std::runtime_error(std::string("CUDA could not ") + what + ": " + cudaGetErrorString(status) + ".");
}

int attribute(cudaDeviceAttr name, int device) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, name, device), "tell what the device has");
  return value;
}

constexpr int shared_of_own = 2048;  // more than the kernel's own few sums take
constexpr int most_devices = 64;

template <class Number>
Limits limits_of(int device) {
  const int of_block = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  const int of_all = attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor, device);
  const int reserved = attribute(cudaDevAttrReservedSharedMemoryPerBlock, device);
  return {of_block - shared_of_own, of_all / blocks_at_once<Number> - reserved - shared_of_own,
          attribute(cudaDevAttrClusterLaunch, device) != 0};
}

// Asks the device once what it has for a kernel, and lets the kernel use it.
template <class Student, class Teacher>
const Limits& forward_limits(int device) {
  static std::once_flag asked[most_devices];
  static Limits limits[most_devices];
  if (device < 0 || device >= most_devices) throw std::runtime_error("The loss runs on the first 64 devices alone.");
  std::call_once(asked[device], [&] {
    const auto kernel = forward_kernel<Student, Teacher>;
    limits[device] = limits_of<NumberFor<Student>>(device);
    for (const auto& [attribute, value] :
         {std::pair(cudaFuncAttributeMaxDynamicSharedMemorySize, int(limits[device].shared)),
          // or the driver may keep more of it as cache than leaves room for several blocks
          std::pair(cudaFuncAttributePreferredSharedMemoryCarveout, int(cudaSharedmemCarveoutMaxShared))})
      check(cudaFuncSetAttribute(kernel, attribute, value), "get the shared memory of the loss's forward kernel");
  });
  return limits[device];
}

}  // namespace

void ft_loss_forward(const Forward& job, int device, void* stream) {
  check(cudaSetDevice(device), "use the device of the factors");
  with_types(job.student.dtype, job.teacher.dtype, [&](auto student, auto teacher) {
    using Student = decltype(student);
    using Teacher = decltype(teacher);
    const auto plan = plan_forward<Student, Teacher>(job, forward_limits<Student, Teacher>(device));
    cudaLaunchAttribute cluster;
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim = {unsigned(plan.blocks), 1, 1};
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(unsigned(job.samples * plan.blocks));
    config.blockDim = dim3(unsigned(plan.threads));
    config.dynamicSmemBytes = size_t(plan.shared_bytes);
    config.stream = cudaStream_t(stream);
    config.attrs = &cluster;
    config.numAttrs = plan.blocks > 1 ? 1 : 0;
    check(cudaLaunchKernelEx(&config, forward_kernel<Student, Teacher>, job, plan),
          "launch the loss's forward kernel");
  });
}

void ft_loss_backward(const Backward& job, int device, void* stream) {
  check(cudaSetDevice(device), "use the device of the factors");
  with_types(job.student.dtype, job.teacher.dtype, [&](auto student, auto teacher) {
    using Student = decltype(student);
    using Teacher = decltype(teacher);
    const auto plan = plan_backward<Student, Teacher>(job);
    backward_kernel<Student, Teacher>
        <<<unsigned(job.samples * plan.blocks), plan.threads, 0, cudaStream_t(stream)>>>(job, plan);
  });
  check(cudaGetLastError(), "launch the loss's backward kernel");
}

std::string ft_loss_problem(int device) {
  cudaError_t status = cudaSetDevice(device);
  const auto load = [&](auto kernel) {
    cudaFuncAttributes attributes;
    if (status == cudaSuccess) status = cudaFuncGetAttributes(&attributes, kernel);
  };
  // Every kernel, so that none is loaded for the first time while a stream is captured.
  with_every_type([&](auto s, auto t) {
    load(forward_kernel<decltype(s), decltype(t)>);
    load(backward_kernel<decltype(s), decltype(t)>);
  });
  if (status == cudaSuccess) return "";
  cudaGetLastError();
  return cudaGetErrorString(status);
}

}  // namespace ftfast::cuda
