// A loop's turns among threads.
#pragma once

#include <algorithm>
#include <cstdint>
#include <new>

namespace ftfast {

// Bytes that are worth a second thread: waking one costs microseconds.
constexpr int64_t bytes_per_thread = 32768;

// body(i) for i in 0 .. count - 1, in equal runs; bytes: what all of them read and write together.
template <class Body>
void share(int64_t count, int64_t bytes, int threads, Body body) {
  const int workers = int(std::max<int64_t>(1, std::min<int64_t>({threads, count, bytes / bytes_per_thread})));
  (void)workers;
  bool out_of_memory = false;  // an exception must not leave a parallel region
#pragma omp parallel for num_threads(workers) schedule(static)
  for (int64_t i = 0; i < count; ++i) {
    try {
      body(i);
    } catch (const std::bad_alloc&) {
      out_of_memory = true;
    }
  }
  if (out_of_memory) throw std::bad_alloc();
}

}  // namespace ftfast
