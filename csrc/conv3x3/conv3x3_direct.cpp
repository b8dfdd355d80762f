// The driver of the direct convolution: packs weights and shares samples between threads.
#include "conv3x3_direct.h"

#include <algorithm>

#include "dtype.h"
#include "share.h"

namespace ftfast {

void conv3x3_direct(const DirectConvolution& work) {
  const DirectKernels kernels = direct_kernels();
  const int64_t in_sample = work.height * work.width * work.channels, out_sample = work.height * work.width * work.outputs;
  // A few samples are cut into bands of rows, so that every thread has work.
  const int64_t wanted = 4 * work.threads;
  const int64_t bands = work.samples >= wanted ? 1 : std::min(work.height, (wanted + work.samples - 1) / work.samples);
  const int64_t bytes = 2 * work.samples * (in_sample + out_sample) * 16;  // arithmetic outweighs the bytes that much
  share(work.samples * bands, bytes, work.threads, [&](int64_t part) {
    const int64_t sample = part / bands, band = part % bands;
    const int64_t first = work.height * band / bands, last = work.height * (band + 1) / bands;
    for (int64_t k = 0; k < work.outputs;) {
      const bool wide = work.outputs - k >= 2 * direct_block;
      DirectConvolution turn = work;
      turn.input += sample * in_sample;
      turn.weight += k * 9 * work.channels;
      turn.bias = work.bias ? work.bias + k : nullptr;
      turn.residual = work.residual ? work.residual + sample * out_sample + k : nullptr;
      turn.result += sample * out_sample + k;
      (wide ? kernels.rows32 : kernels.rows16)(turn, first, last);
      k += wide ? 2 * direct_block : direct_block;
    }
  });
}

void pack_direct_weight(const float* from, const int64_t strides[4], int64_t outputs, int64_t channels,
                        bool for_gradient, uint16_t* to, int threads) {
  const int64_t rows = for_gradient ? channels : outputs, inner = for_gradient ? outputs : channels;
  const int64_t row_stride = strides[for_gradient ? 1 : 0], inner_stride = strides[for_gradient ? 0 : 1];
  share(rows / direct_block, 9 * outputs * channels * int64_t(sizeof *from), threads, [&](int64_t block) {
    uint16_t* const packed = to + block * direct_block * 9 * inner;
    for (int64_t pair = 0; pair < inner; pair += 2)
      for (int64_t row = 0; row < direct_block; ++row) {
        const float* first = from + (block * direct_block + row) * row_stride + pair * inner_stride;
        for (int64_t ky = 0; ky < 3; ++ky)
          for (int64_t kx = 0; kx < 3; ++kx) {
            const float* tap = first + (for_gradient ? 2 - ky : ky) * strides[2] + (for_gradient ? 2 - kx : kx) * strides[3];
            uint16_t* target = packed + ((ky * inner / 2 + pair / 2) * 3 + kx) * 2 * direct_block + 2 * row;
            target[0] = to_bfloat16(tap[0]).bits;
            target[1] = to_bfloat16(tap[inner_stride]).bits;
          }
      }
  });
}

}  // namespace ftfast
