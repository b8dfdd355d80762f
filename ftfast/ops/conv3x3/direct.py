"""A 3x3 convolution of bfloat16 maps on the CPU in C++ of our own, with bias, residual and LeakyReLU behind it.

Two kernels compute it: on Intel's matrix tiles (AMX) where there are, elsewhere with AVX512-BF16's dot products, which
were faster than oneDNN's at every size measured, by a tenth with many channels and a third with 16. A convolution's
input gradient and a transposed convolution are the same with the weight packed for the gradient.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ftfast.extension import extension, load_extension
from ftfast.ops.memory import plain

TILES, DIRECT = "tiles", "direct"
CONVOLUTION, WEIGHT_GRADIENT = "convolution", "weight gradient"
_BLOCK = 16  # channels are multiples of it
_TILE = 32  # summed channels are filled up to a multiple of it for the tiles

# The fewest channels, of both maps, with which tiles compute a work; oneDNN, which uses tiles too, computes the others.
# From one run of a prototype of these kernels beside oneDNN on two cores of a Xeon, not yet measured with the kernels
# themselves: bench conv3x3 has each of these sizes, and ftfast tune measures the weight gradient.
LEAST_CHANNELS = {
    # 1.5 times oneDNN's speed at 32x512->512x7x7 and 1.1 at 128x64->64x8x8, but 0.9 at 128x32->32x16x16.
    CONVOLUTION: 64,
    # 2.4 times oneDNN's speed at 32x512->512x7x7 and 1.8 at 128x64->64x8x8, but a third of it at 128x32->32x16x16,
    # which the prototype computed on one of two threads and packed number by number.
    WEIGHT_GRADIENT: 64,
}


class PackedWeight(NamedTuple):
    """A weight in the order in which a kernel reads it, bfloat16, for ``channels`` to ``outputs``."""

    words: Tensor
    outputs: int
    channels: int
    kernel: str


def _fastest() -> str | None:
    found, _ = load_extension()
    if found is None:
        return None
    if hasattr(found, "conv3x3_tiles"):
        return TILES
    # Where oneDNN has tiles and no kernel of ours has, it is faster than dot products.
    return DIRECT if hasattr(found, "conv3x3_direct") and found.why_no_tiles() else None


# The kernel that this processor runs fastest, None where there is none or oneDNN's is faster.
FASTEST = _fastest()


def fits(channels: int, outputs: int) -> bool:
    """Whether kernels of our own take these channels: multiples of 16."""
    return channels % _BLOCK == 0 and outputs % _BLOCK == 0


def kernel_for(work: str, dtype: torch.dtype, channels: int, outputs: int) -> str | None:
    """Which kernel of our own computes CONVOLUTION or WEIGHT_GRADIENT, with stride 1 and padding 1; None for oneDNN."""
    if dtype != torch.bfloat16 or not fits(channels, outputs):
        return None
    return None if FASTEST == TILES and min(channels, outputs) < LEAST_CHANNELS[work] else FASTEST


def takes(dtype: torch.dtype, channels: int, outputs: int) -> bool:
    """Whether a convolution with stride 1 and padding 1, or its input's gradient, is computed here."""
    return kernel_for(CONVOLUTION, dtype, channels, outputs) is not None


def pack(weight: Tensor, *, for_gradient: bool = False, kernel: str | None = None) -> PackedWeight:
    """``[K, C, 3, 3]``, any strides, for the kernel that is fastest here unless one is named.

    ``for_gradient`` of a convolution's input from that of its result.
    """
    weight = plain(weight.detach()).float()
    kernel = kernel or FASTEST or DIRECT
    outputs, channels = weight.shape[:2]
    of_result, summed = (channels, outputs) if for_gradient else (outputs, channels)
    filled = -(-summed // _TILE) * _TILE if kernel == TILES else summed
    words = torch.empty(of_result * filled * 9, dtype=torch.bfloat16, device=weight.device)
    getattr(extension(), f"pack_{kernel}_weight")(
        weight.data_ptr(),
        weight.stride(),
        outputs,
        channels,
        for_gradient,
        words.data_ptr(),
        torch.get_num_threads(),
    )
    return PackedWeight(words, of_result, summed, kernel)


def convolve(
    x: Tensor,
    weight: PackedWeight,
    bias: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    negative_slope: float = 1.0,
) -> Tensor:
    """``leaky_relu(conv(x) + bias + residual)``, rounded once.

    Args:
        x: ``[N, C, H, W]`` bfloat16, channels_last.
        bias: ``[K]`` float32.
        residual: ``[N, K, H, W]`` bfloat16, channels_last.
        negative_slope: 0 for a ReLU, 1 for none.
    """
    samples, channels, height, width = x.shape
    bias = None if bias is None else plain(bias)
    y = torch.empty(
        samples, weight.outputs, height, width, dtype=x.dtype, memory_format=torch.channels_last, device=x.device
    )
    getattr(extension(), f"conv3x3_{weight.kernel}")(
        x.data_ptr(),
        weight.words.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        0 if residual is None else residual.data_ptr(),
        y.data_ptr(),
        samples,
        height,
        width,
        channels,
        weight.outputs,
        negative_slope,
        torch.get_num_threads(),
    )
    return y
