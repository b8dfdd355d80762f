"""Triton kernels of the 3x3 convolution with LeakyReLU and of its input gradient: one launch each, any map size.

One kernel multiplies either way: the input gradient is a convolution with the flipped and transposed weight.
"""

# mypy: disallow-incomplete-defs=False
# (a kernel's parameters carry Triton's annotations, and only where Triton needs one)

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import conv3x3_tiles
from .conv3x3_accumulate import accumulate_taps as accumulate_taps
from .conv3x3_accumulate import multiply_accumulate as multiply_accumulate
from .conv3x3_epilogues import store_activated_tile as store_activated_tile
from .conv3x3_epilogues import store_gradient_tile as store_gradient_tile
from .launch import device_guard
from .map_descriptors import describe

TAPS = 9

# What varies from step to step must not be part of Triton's cache key. A constant number of taps would be unrolled.
_RUNTIME_NUMBERS = ["pixels", "height", "width", "taps"]


@triton.jit(do_not_specialize=_RUNTIME_NUMBERS)
def _conv3x3_forward_kernel(
    x,
    weight,
    y,
    bias,
    pixels,
    height,
    width,
    taps,
    negative_slope: tl.float32,
    CHANNELS: tl.constexpr,
    PADDED_CHANNELS: tl.constexpr,
    CHANNELS_OUT: tl.constexpr,
    COLUMNS: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
    BC: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    """``y = leaky_relu(conv(x) + bias)``, x ``[N, H, W, C]``, y ``[N, H, W, K]``; a program owns ``[BM, BK]`` of y."""
    # Programs side by side share their pixels; all of the weight stays in the L2 cache.
    COLUMN_TILES: tl.constexpr = (COLUMNS + BK - 1) // BK
    first_pixel = (tl.program_id(0) // COLUMN_TILES) * BM
    first_column = (tl.program_id(0) % COLUMN_TILES) * BK
    accumulator = accumulate_taps(
        x,
        weight,
        first_pixel,
        first_column,
        pixels,
        height,
        width,
        taps,
        CHANNELS,
        PADDED_CHANNELS,
        COLUMNS,
        BM,
        BK,
        BC,
        DESCRIPTORS,
        INPUT_PRECISION,
    )
    store_activated_tile(
        y,
        accumulator,
        bias,
        negative_slope,
        first_pixel,
        first_column,
        pixels,
        CHANNELS_OUT,
        BM,
        BK,
        HAS_BIAS,
        DESCRIPTORS,
    )


@triton.jit(do_not_specialize=_RUNTIME_NUMBERS)
def _conv3x3_input_gradient_kernel(
    dz,
    weight,
    dx,
    output,
    partials,
    scale,
    pixels,
    height,
    width,
    taps,
    negative_slope: tl.float32,
    CHANNELS: tl.constexpr,
    PADDED_CHANNELS: tl.constexpr,
    CHANNELS_OUT: tl.constexpr,
    COLUMNS: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
    BC: tl.constexpr,
    HAS_OUTPUT: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    """``dx = conv_transposed(dz) * scale * slope(output)``: CHANNELS are dz's, CHANNELS_OUT those of dx and output.

    All three are ``[N, H, W, channels]``; partials ``[tiles of pixels, CHANNELS_OUT]`` takes dx's column sums.
    """
    COLUMN_TILES: tl.constexpr = (COLUMNS + BK - 1) // BK
    first_pixel = (tl.program_id(0) // COLUMN_TILES) * BM
    first_column = (tl.program_id(0) % COLUMN_TILES) * BK
    accumulator = accumulate_taps(
        dz,
        weight,
        first_pixel,
        first_column,
        pixels,
        height,
        width,
        taps,
        CHANNELS,
        PADDED_CHANNELS,
        COLUMNS,
        BM,
        BK,
        BC,
        DESCRIPTORS,
        INPUT_PRECISION,
    )
    factor = 1.0
    if HAS_SCALE:
        factor = tl.load(scale)
    store_gradient_tile(
        dx,
        output,
        partials,
        accumulator,
        factor,
        negative_slope,
        first_pixel,
        first_column,
        pixels,
        CHANNELS_OUT,
        BM,
        BK,
        HAS_OUTPUT,
        DESCRIPTORS,
    )


class _Tiling(NamedTuple):
    """What both launches have in common."""

    operands: list[Any]
    tiles_of_pixels: int
    programs: int
    options: dict[str, Any]


def _tiling(
    operation: str, source: Tensor, weight: Tensor, maps: list[Tensor], input_precision: str, *, halves: bool
) -> _Tiling:
    """Operands (source, weight, then the maps that are written and read at the end, in halves or not), constants."""
    pixels, channels, channels_out = source.shape[:3].numel(), source.shape[3], maps[0].shape[3]
    table = conv3x3_tiles.table(source, *maps)
    bm, bk, bc, warps, stages = conv3x3_tiles.convolution_tile(
        operation, table, source.dtype, channels, channels_out, pixels, conv3x3_tiles.multiprocessors(source.device)
    )
    descriptors = conv3x3_tiles.copied_by(table)
    operands: list[Any] = [source, weight, *maps]
    if descriptors:
        rounded = input_precision == "tf32"
        operands = [
            describe(source.view(pixels, channels), bm, bc, rounded=rounded),
            describe(weight, bc, bk, rounded=rounded),
            *(describe(each.view(pixels, channels_out), bm, bk // 2 if halves else bk) for each in maps),
        ]
    options = {
        "CHANNELS": channels,
        "PADDED_CHANNELS": weight.shape[0] // TAPS,
        "CHANNELS_OUT": channels_out,
        "COLUMNS": weight.shape[1],
        "BM": bm,
        "BK": bk,
        "BC": bc,
        "DESCRIPTORS": descriptors,
        "INPUT_PRECISION": input_precision,
        "num_warps": warps,
        "num_stages": stages,
        "enable_fp_fusion": True,
    }
    tiles_of_pixels = triton.cdiv(pixels, bm)
    return _Tiling(operands, tiles_of_pixels, tiles_of_pixels * triton.cdiv(weight.shape[1], bk), options)


def conv3x3_forward(
    x: Tensor,
    packed_forward: Tensor,
    bias: Tensor | None,
    *,
    channels_out: int,
    negative_slope: float,
    input_precision: str = "tf32",
) -> Tensor:
    """``leaky_relu(conv(x) + bias)``: 3x3, stride 1, padding 1.

    Args:
        x: ``[N, H, W, C]`` contiguous, float32, bfloat16 or float16, no size 0, on a GPU (on the CPU in Triton's
            interpreter). Nothing is checked here.
        packed_forward: ``.forward`` of :func:`ftfast.kernels.pack_weights.pack_weights` in the dtype of x.
        bias: float32 ``[channels_out]``, or None.
        channels_out: K.
        negative_slope: of LeakyReLU; 1.0 for a convolution without activation.
        input_precision: of float32 products, "tf32" or "tf32x3"; sums are float32 for every dtype.

    Returns:
        ``[N, H, W, K]`` contiguous, in the dtype of x.
    """
    samples, height, width, _ = x.shape
    y = torch.empty((*x.shape[:3], channels_out), dtype=x.dtype, device=x.device)
    operands, _, programs, options = _tiling("forward", x, packed_forward, [y], input_precision, halves=False)
    with device_guard(x.device):
        _conv3x3_forward_kernel[(programs,)](
            *operands,
            packed_forward if bias is None else bias,
            samples * height * width,
            height,
            width,
            TAPS,
            negative_slope,
            HAS_BIAS=bias is not None,
            **options,
        )
    return y


def conv3x3_input_gradient(
    dz: Tensor,
    packed_backward: Tensor,
    output_of_previous: Tensor | None,
    *,
    channels_out: int,
    negative_slope: float,
    scale: Tensor | None = None,
    input_precision: str = "tf32",
) -> tuple[Tensor, Tensor | None]:
    """The gradient of a 3x3 convolution's input, carried on through the LeakyReLU that made this input.

    Args:
        dz: ``[N, H, W, K]`` contiguous, the gradient of the convolution's result; dtypes and devices as in
            :func:`conv3x3_forward`. Nothing is checked here.
        packed_backward: ``.backward`` of :func:`ftfast.kernels.pack_weights.pack_weights` in the dtype of dz.
        output_of_previous: the convolution's input, contiguous, if it came out of LeakyReLU: the slope is read from
            it. None for the plain gradient.
        channels_out: C, the channels of the convolution's input.
        negative_slope: of that LeakyReLU, above 0.
        scale: 0-d float32 on the device of dz, multiplies the gradient before it is rounded.
        input_precision: as in :func:`conv3x3_forward`.

    Returns:
        dx ``[N, H, W, C]`` contiguous in the dtype of dz; and float32 partials ``[tiles, C]`` whose sum over tiles
        (:func:`ftfast.kernels.activation.sum_partials`) is that of dx over pixels before rounding, the previous layer's
        bias gradient; None without output_of_previous.
    """
    samples, height, width, _ = dz.shape
    dx = torch.empty((*dz.shape[:3], channels_out), dtype=dz.dtype, device=dz.device)
    output = dx if output_of_previous is None else output_of_previous
    operands, tiles, programs, options = _tiling(
        "input gradient", dz, packed_backward, [dx, output], input_precision, halves=True
    )
    partials = None
    if output_of_previous is not None:
        partials = torch.empty((tiles, channels_out), dtype=torch.float32, device=dz.device)
    unused = packed_backward
    with device_guard(dz.device):
        _conv3x3_input_gradient_kernel[(programs,)](
            *operands,
            unused if partials is None else partials,
            unused if scale is None else scale,
            samples * height * width,
            height,
            width,
            TAPS,
            negative_slope,
            HAS_OUTPUT=partials is not None,
            HAS_SCALE=scale is not None,
            **options,
        )
    return dx, partials
