// The driver of the attention maps: shares samples, and the pixels of large ones, between threads.
#include "attention.h"

#include "caches.h"
#include "share.h"

namespace ftfast {
namespace {

template <class Kernel>
void each_part(const AttentionMap& work, bool gradient, Kernel kernel) {
  const int64_t element = work.dtype == DType::float32 ? 4 : 2, sample = work.channels * work.pixels;
  const int64_t bytes = work.samples * sample * element;
  const int64_t parts = (work.pixels + pixels_at_once - 1) / pixels_at_once;
  share(work.samples * parts, bytes, work.threads, [&](int64_t i) {
    const int64_t n = i / parts, part = i % parts;
    AttentionMap turn = work;
    turn.past_caches = work.dtype == DType::float32 && bytes >= past_caches_bytes;
    turn.features = static_cast<const char*>(work.features) + n * sample * element;
    turn.upstream = work.upstream ? work.upstream + n * work.pixels : nullptr;
    turn.result = static_cast<char*>(work.result) + n * (gradient ? sample * element : work.pixels * 4);
    const int64_t rows = gradient && !work.channels_last ? work.channels : work.pixels;
    kernel(turn, rows * part / parts, rows * (part + 1) / parts);
  });
}

}  // namespace

void attention_map(const AttentionMap& work) {
  each_part(work, false, attention_kernels(work.dtype, work.channels_last, work.exponent).map);
}

void attention_gradient(const AttentionMap& work) {
  each_part(work, true, attention_kernels(work.dtype, work.channels_last, work.exponent).gradient);
}

}  // namespace ftfast
