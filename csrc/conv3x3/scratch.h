// Memory for packed maps.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

namespace ftfast {
namespace {

// It is kept from call to call up to this many bytes a calling thread: a step frees and allocates so much that it would
// be fresh pages each time, and to fault those in costs as much as the products.
constexpr int64_t bytes_kept = 32 << 20;

class Scratch {
 public:
  // Whole cache lines from an aligned start; what was there before is lost.
  void* of_size(int64_t bytes) {
    if (bytes > size_) {
      memory_.reset();
      size_ = 0;
      memory_.reset(std::aligned_alloc(64, size_t(bytes + 63) / 64 * 64));
      if (!memory_) throw std::bad_alloc();
      size_ = bytes;
    }
    return memory_.get();
  }

 private:
  struct Free {
    void operator()(void* memory) const { std::free(memory); }
  };
  std::unique_ptr<void, Free> memory_;
  int64_t size_ = 0;
};

}  // namespace
}  // namespace ftfast
