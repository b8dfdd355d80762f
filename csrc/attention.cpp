// The driver of the attention maps: shares samples, and the pixels of large ones, between threads.
#include "attention.h"

#include <memory>

#include "caches.h"
#include "share.h"

namespace ftfast {
namespace {

int64_t parts_of(const AttentionMap& work) { return (work.pixels + pixels_at_once - 1) / pixels_at_once; }

int64_t bytes_of_sample(const AttentionMap& work) {
  return work.channels * work.pixels * (work.dtype == DType::float32 ? 4 : 2);
}

AttentionKernels kernels_of(const AttentionMap& work) {
  return attention_kernels(work.dtype, work.channels_last, work.exponent);
}

// What is worked at, moved to a sample. The upstream gradient is the map's that is given.
AttentionMap sample_of(const AttentionMap& work, int64_t n, void* result, const float* upstream) {
  const int64_t bytes = bytes_of_sample(work);
  AttentionMap turn = work;
  turn.past_caches = work.dtype == DType::float32 && work.samples * bytes >= past_caches_bytes;
  turn.features = static_cast<const char*>(work.features) + n * bytes;
  turn.result = result;
  turn.upstream = upstream;
  return turn;
}

void map_part(const AttentionMap& work, const AttentionKernels& kernels, int64_t n, int64_t part, float* map) {
  const int64_t parts = parts_of(work);
  kernels.map(sample_of(work, n, map, nullptr), work.pixels * part / parts, work.pixels * (part + 1) / parts);
}

void gradient_part(const AttentionMap& work, const AttentionKernels& kernels, int64_t n, int64_t part, int64_t parts,
                   const float* upstream) {
  const int64_t rows = work.channels_last ? work.pixels : work.channels;
  char* result = static_cast<char*>(work.result) + n * bytes_of_sample(work);
  kernels.gradient(sample_of(work, n, result, upstream), rows * part / parts, rows * (part + 1) / parts);
}

}  // namespace

void attention_map(const AttentionMap& work) {
  const AttentionKernels kernels = kernels_of(work);
  const int64_t parts = parts_of(work);
  float* maps = static_cast<float*>(work.result);
  share(work.samples * parts, work.samples * bytes_of_sample(work), work.threads, [&](int64_t i) {
    map_part(work, kernels, i / parts, i % parts, maps + i / parts * work.pixels);
  });
}

void attention_gradient(const AttentionMap& work) {
  const AttentionKernels kernels = kernels_of(work);
  const int64_t parts = parts_of(work);
  share(work.samples * parts, work.samples * bytes_of_sample(work), work.threads, [&](int64_t i) {
    gradient_part(work, kernels, i / parts, i % parts, parts, work.upstream + i / parts * work.pixels);
  });
}

float attention_difference(const AttentionDifference& work) {
  const AttentionMap& student = work.student;
  const AttentionKernels kernels = kernels_of(student);
  const int64_t samples = student.samples, pixels = student.pixels;
  const double scale = 1 / (double(samples) * double(pixels));
  Problem loss;  // of one sample's maps
  loss.samples = loss.dims = 1;
  loss.size = loss.sizes[0] = pixels;
  loss.student.strides[0] = 1;
  loss.student.dense = true;
  loss.teacher = loss.student_gradient = loss.student;
  loss.p = work.p;
  loss.eps = work.eps;
  loss.scale = 1;
  loss.upstream = work.p == 1 ? scale * work.upstream : 1;
  loss.mean_of_rows = false;
  const std::unique_ptr<float[]> rows(new float[samples * 2 * pixels]), distances(new float[samples]);
  share(samples, 2 * samples * bytes_of_sample(student), student.threads, [&](int64_t n) {
    float *map = &rows[n * 2 * pixels], *upstream = map + pixels;
    for (int64_t part = 0; part < parts_of(student); ++part) map_part(student, kernels, n, part, map);
    Problem one = loss;
    one.student.data = reinterpret_cast<char*>(map);
    one.teacher.data = reinterpret_cast<char*>(const_cast<float*>(work.teacher_map + n * pixels));
    one.student_gradient.data = student.result ? reinterpret_cast<char*>(upstream) : nullptr;
    ft_loss_forward(one, &distances[n], nullptr);
    if (!student.result) return;
    if (work.p == 2) {  // the loss has the square of that distance
      const float factor = float(2 * scale * work.upstream * distances[n]);
      for (int64_t i = 0; i < pixels; ++i) upstream[i] *= factor;
    }
    gradient_part(student, kernels, n, 0, 1, upstream);
  });
  double total = 0;
  for (int64_t n = 0; n < samples; ++n) total += work.p == 1 ? distances[n] : double(distances[n]) * distances[n];
  return float(total * scale);
}

}  // namespace ftfast
