// Picks the row kernels of the best instruction set that this processor has, or of FTFAST_INSTRUCTION_SET if it has that.
#include <cstdlib>
#include <cstring>
#include <stdexcept>

#include "attention.h"
#include "batch_norm.h"
#include "conv3x3/conv3x3.h"
#include "conv3x3/conv3x3_direct.h"
#include "conv3x3/conv3x3_tiles.h"
#include "ft_head.h"
#include "ft_loss.h"
#include "conv3x3/tile_permission.h"

namespace ftfast {

namespace baseline {
RowKernels row_kernels(DType student, DType teacher);
HeadKernels head_kernels(DType dtype);
NormKernels norm_kernels(DType dtype);
AttentionKernels attention_kernels(DType dtype, bool channels_last, int exponent);
}
#if defined(FTFAST_X86)
namespace avx2 {
RowKernels row_kernels(DType student, DType teacher);
HeadKernels head_kernels(DType dtype);
NormKernels norm_kernels(DType dtype);
AttentionKernels attention_kernels(DType dtype, bool channels_last, int exponent);
}
namespace avx512 {
RowKernels row_kernels(DType student, DType teacher);
HeadKernels head_kernels(DType dtype);
NormKernels norm_kernels(DType dtype);
AttentionKernels attention_kernels(DType dtype, bool channels_last, int exponent);
}
#endif
#if defined(FTFAST_AVX512_BF16)
namespace avx512_bf16 {
WeightGradientKernels weight_gradient_kernels();
DirectKernels direct_kernels();
}
#endif
#if defined(FTFAST_AMX)
namespace amx {
TileKernels tile_kernels();
TileGradientKernels tile_gradient_kernels();
}
#endif

namespace {

struct InstructionSet {
  const char* name;
  RowKernels (*row_kernels)(DType, DType);
  HeadKernels (*head_kernels)(DType);
  NormKernels (*norm_kernels)(DType);
  AttentionKernels (*attention_kernels)(DType, bool, int);
};

InstructionSet detect() {
#if defined(FTFAST_X86)
  const char* wanted = std::getenv("FTFAST_INSTRUCTION_SET");
  const auto allowed = [&](const char* name) { return !wanted || !*wanted || std::strcmp(wanted, name) == 0; };
  __builtin_cpu_init();
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  if (allowed("avx512") && has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    return {"avx512", avx512::row_kernels, avx512::head_kernels, avx512::norm_kernels, avx512::attention_kernels};
  if (allowed("avx2") && has_avx2) return {"avx2", avx2::row_kernels, avx2::head_kernels, avx2::norm_kernels, avx2::attention_kernels};
#endif
  return {"baseline", baseline::row_kernels, baseline::head_kernels, baseline::norm_kernels, baseline::attention_kernels};
}

const InstructionSet& current() {
  static const InstructionSet chosen = detect();
  return chosen;
}

}  // namespace

// No kernel is a null pointer that somebody calls.
template <class Kernels>
static Kernels known(Kernels kernels, bool exists) {
  if (!exists) throw std::logic_error("there are no kernels for these dtypes");
  return kernels;
}

RowKernels row_kernels(DType student, DType teacher) {
  const RowKernels kernels = current().row_kernels(student, teacher);
  return known(kernels, kernels.squares);
}
HeadKernels head_kernels(DType dtype) {
  const HeadKernels kernels = current().head_kernels(dtype);
  return known(kernels, kernels.leaky_relu_backward);
}
AttentionKernels attention_kernels(DType dtype, bool channels_last, int exponent) {
  const AttentionKernels kernels = current().attention_kernels(dtype, channels_last, exponent);
  return known(kernels, kernels.map);
}
NormKernels norm_kernels(DType dtype) {
  const NormKernels kernels = current().norm_kernels(dtype);
  return known(kernels, kernels.statistics);
}
#if defined(FTFAST_AVX512_BF16)
static bool has_bf16() {
  static const bool supported = std::strcmp(current().name, "avx512") == 0 && __builtin_cpu_supports("avx512bf16");
  return supported;
}
WeightGradientKernels weight_gradient_kernels() {
  return has_bf16() ? avx512_bf16::weight_gradient_kernels() : WeightGradientKernels();
}
DirectKernels direct_kernels() { return has_bf16() ? avx512_bf16::direct_kernels() : DirectKernels(); }
#else
WeightGradientKernels weight_gradient_kernels() { return {}; }
DirectKernels direct_kernels() { return {}; }
#endif
#if defined(FTFAST_AMX)
// avx512 in FTFAST_INSTRUCTION_SET asks for less than tiles.
static bool has_tiles() {
  const char* wanted = std::getenv("FTFAST_INSTRUCTION_SET");
  static const bool supported = has_bf16() && (!wanted || !*wanted) && !*why_no_tiles();
  return supported;
}
TileKernels tile_kernels() { return has_tiles() ? amx::tile_kernels() : TileKernels(); }
TileGradientKernels tile_gradient_kernels() {
  return has_tiles() ? amx::tile_gradient_kernels() : TileGradientKernels();
}
#else
TileKernels tile_kernels() { return {}; }
TileGradientKernels tile_gradient_kernels() { return {}; }
#endif
const char* instruction_set() { return current().name; }

}  // namespace ftfast
