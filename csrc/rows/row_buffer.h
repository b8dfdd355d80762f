// Numbers of any dtype one at a time, and samples as the row kernels take them: gathered and converted. The loss's driver
// alone includes it.
#pragma once

#include <cstdlib>
#include <memory>
#include <new>
#include <stdexcept>

#include "dtype.h"
#include "ft_loss.h"
#include "gather.h"

namespace ftfast {
namespace {

// Every switch over dtypes names them all, so that the compiler tells of one that is lacking.
[[noreturn]] void no_such_dtype() { throw std::logic_error("a dtype that the loss does not take"); }

int64_t bytes_of(DType dtype) {
  switch (dtype) {
    case DType::float64: return 8;
    case DType::float32: return 4;
    case DType::bfloat16: case DType::float16: return 2;
    case DType::int8: case DType::float8_e4m3fn: return 1;
  }
  no_such_dtype();
}

template <class Run>
void with_element(DType dtype, Run run) {
  switch (bytes_of(dtype)) {
    case 8: return run(uint64_t());
    case 4: return run(uint32_t());
    case 2: return run(uint16_t());
    case 1: return run(uint8_t());
  }
}

double value_at(const void* row, DType dtype, int64_t i) {
  switch (dtype) {
    case DType::float64: return static_cast<const double*>(row)[i];
    case DType::float32: return static_cast<const float*>(row)[i];
    case DType::bfloat16: return to_float(static_cast<const BFloat16*>(row)[i]);
    case DType::float16: return to_float(static_cast<const Float16*>(row)[i]);
    case DType::int8: return static_cast<const int8_t*>(row)[i];
    case DType::float8_e4m3fn: return to_float(static_cast<const Float8*>(row)[i]);
  }
  no_such_dtype();
}

void put_value(void* row, DType dtype, int64_t i, double value) {
  switch (dtype) {
    case DType::float64: static_cast<double*>(row)[i] = value; break;
    case DType::float32: static_cast<float*>(row)[i] = float(value); break;
    case DType::bfloat16: static_cast<BFloat16*>(row)[i] = to_bfloat16(float(value)); break;
    case DType::float16: static_cast<Float16*>(row)[i] = to_float16(float(value)); break;
    case DType::int8: case DType::float8_e4m3fn: no_such_dtype();  // nothing is written in them
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

}  // namespace
}  // namespace ftfast
