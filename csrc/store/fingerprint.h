// A number that tells contents of memory apart, read at the speed of memory.
#pragma once

#include <cstdint>
#include <vector>

namespace ftfast {

struct Span {
  const char* data;
  int64_t bytes;
};

// Of all bytes and their order; the same for any number of threads. A change to one word is always seen, one to many
// goes unseen once in 2^64.
uint64_t fingerprint(const std::vector<Span>& spans, int threads);

}  // namespace ftfast
