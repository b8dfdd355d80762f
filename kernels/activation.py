"""Triton kernels round a library's convolution: bias and LeakyReLU in place, and its derivative with the bias gradient.

The derivative is read from LeakyReLU's output: 1 where that is positive, else the slope. Bias gradients are column sums
in two steps, partial sums and :func:`sum_partials`, both in a fixed order.
"""

# mypy: disallow-incomplete-defs=False
# (a kernel's parameters carry Triton's annotations, and only where Triton needs one)

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .device import device_guard
from .launch import ceil_div, launch, power_of_2

# Numbers that a program holds at once, and the widest block of columns.
BLOCK = 2048
WIDEST = 256
WARPS = 4
# Rows of partial sums: at most this many, each of at least so many pixels.
MOST_PIECES = 1024
SMALLEST_PIECE = 64
SUM_ROWS = 128
SUM_COLUMNS = 32
SUM_WARPS = 8
SUMS = 3


@triton.jit(do_not_specialize=["pixels"])
def _bias_leaky_relu_kernel(
    z,
    bias,
    pixels,
    negative_slope: tl.float32,
    CHANNELS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """``z = leaky_relu(z + bias)`` in place, z ``[pixels, CHANNELS]``, bias ``[CHANNELS]``."""
    COLUMN_TILES: tl.constexpr = (CHANNELS + COLUMNS - 1) // COLUMNS
    row = (tl.program_id(0) // COLUMN_TILES) * ROWS
    lane = tl.arange(0, ROWS)
    column = (tl.program_id(0) % COLUMN_TILES) * COLUMNS + tl.arange(0, COLUMNS)
    mask = (row + lane < pixels)[:, None] & (column < CHANNELS)[None, :]
    places = z + row.to(tl.int64) * CHANNELS + (lane[:, None] * CHANNELS + column[None, :])
    values = tl.load(places, mask=mask, other=0.0).to(tl.float32)
    values += tl.load(bias + column, mask=column < CHANNELS, other=0.0)[None, :]
    values = tl.where(values > 0, values, values * negative_slope)
    tl.store(places, values.to(z.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["pixels", "piece"])
def _leaky_relu_backward_kernel(
    gradient,
    output,
    partials,
    pixels,
    piece,
    negative_slope: tl.float32,
    CHANNELS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """``gradient *= slope(output)`` in place, both ``[pixels, CHANNELS]``; a program owns ``piece`` pixels.

    Partials ``[programs, CHANNELS]`` takes the column sums before rounding.
    """
    COLUMN_TILES: tl.constexpr = (CHANNELS + COLUMNS - 1) // COLUMNS
    program = tl.program_id(0) // COLUMN_TILES
    first = program * piece
    last = tl.minimum(first + piece, pixels)
    lane = tl.arange(0, ROWS)
    column = (tl.program_id(0) % COLUMN_TILES) * COLUMNS + tl.arange(0, COLUMNS)
    offsets = lane[:, None] * CHANNELS + column[None, :]
    start = first.to(tl.int64) * CHANNELS
    gradient += start
    output += start
    sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    for row in range(first, last, ROWS):
        mask = (row + lane < last)[:, None] & (column < CHANNELS)[None, :]
        values = tl.load(gradient + offsets, mask=mask, other=0.0).to(tl.float32)
        outputs = tl.load(output + offsets, mask=mask, other=0.0).to(tl.float32)
        values *= tl.where(outputs > 0, 1.0, negative_slope)
        sums += values
        tl.store(gradient + offsets, values.to(gradient.dtype.element_ty), mask=mask)
        gradient += ROWS * CHANNELS
        output += ROWS * CHANNELS
    tl.store(partials + program.to(tl.int64) * CHANNELS + column, tl.sum(sums, 0), mask=column < CHANNELS)


@triton.jit
def _sum_columns(
    partials, total, rows, factor, tile, CHANNELS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    lane = tl.arange(0, ROWS)
    column = tile * COLUMNS + tl.arange(0, COLUMNS)
    offsets = lane[:, None] * CHANNELS + column[None, :]
    sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    for row in range(0, rows, ROWS):
        mask = (row + lane < rows)[:, None] & (column < CHANNELS)[None, :]
        sums += tl.load(partials + offsets, mask=mask, other=0.0)
        partials += ROWS * CHANNELS
    tl.store(total + column, tl.sum(sums, 0) * factor, mask=column < CHANNELS)


@triton.jit(do_not_specialize=["rows0", "rows1", "rows2"])
def _sum_partials_kernel(
    partials0,
    partials1,
    partials2,
    scale,
    total0,
    total1,
    total2,
    rows0,
    rows1,
    rows2,
    CHANNELS0: tl.constexpr,
    CHANNELS1: tl.constexpr,
    CHANNELS2: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    HAS_SCALE: tl.constexpr,
):
    """``total [CHANNELS] = scale * sum over rows of partials [rows, CHANNELS]``, three times; 0 channels are nothing.

    A program owns COLUMNS of one.
    """
    TILES0: tl.constexpr = (CHANNELS0 + COLUMNS - 1) // COLUMNS
    TILES1: tl.constexpr = (CHANNELS1 + COLUMNS - 1) // COLUMNS
    tile = tl.program_id(0)
    factor = 1.0
    if HAS_SCALE:
        factor = tl.load(scale)
    if tile < TILES0:
        _sum_columns(partials0, total0, rows0, factor, tile, CHANNELS0, ROWS, COLUMNS)
    elif tile < TILES0 + TILES1:
        _sum_columns(partials1, total1, rows1, factor, tile - TILES0, CHANNELS1, ROWS, COLUMNS)
    else:
        _sum_columns(partials2, total2, rows2, factor, tile - TILES0 - TILES1, CHANNELS2, ROWS, COLUMNS)


def _block(channels: int) -> tuple[int, int]:
    """Rows and columns of a block."""
    columns = min(power_of_2(channels), WIDEST)
    return BLOCK // columns, columns


def bias_leaky_relu_(z: Tensor, bias: Tensor, negative_slope: float) -> Tensor:
    """``z = leaky_relu(z + bias)`` in place, in one launch.

    Args:
        z: ``[N, H, W, K]`` contiguous, float32, bfloat16 or float16, no size 0, on a GPU (on the CPU in Triton's
            interpreter). Nothing is checked here.
        bias: float32 ``[K]``.
        negative_slope: 1.0 adds the bias alone.

    Returns:
        z.
    """
    pixels, channels = z.shape[:3].numel(), z.shape[3]
    rows, columns = _block(channels)
    with device_guard(z.device):
        launch(
            _bias_leaky_relu_kernel,
            ceil_div(pixels, rows) * ceil_div(channels, columns),
            (z, bias),
            (pixels, negative_slope),
            {"CHANNELS": channels, "ROWS": rows, "COLUMNS": columns, "num_warps": WARPS, "enable_fp_fusion": False},
        )
    return z


def leaky_relu_backward_(gradient: Tensor, output: Tensor, negative_slope: float) -> Tensor:
    """Multiply a gradient by LeakyReLU's derivative in place, in one launch.

    Args:
        gradient: ``[N, H, W, K]`` contiguous, that of LeakyReLU's output; dtypes and devices as in
            :func:`bias_leaky_relu_`. Nothing is checked here.
        output: LeakyReLU's output, contiguous, in any of these dtypes.
        negative_slope: above 0.

    Returns:
        Float32 partials ``[programs, K]``; :func:`sum_partials` makes the bias gradient of them.
    """
    pixels, channels = gradient.shape[:3].numel(), gradient.shape[3]
    rows, columns = _block(channels)
    piece = max(SMALLEST_PIECE, ceil_div(pixels, MOST_PIECES))
    pieces = ceil_div(pixels, piece)
    partials = torch.empty((pieces, channels), dtype=torch.float32, device=gradient.device)
    with device_guard(gradient.device):
        launch(
            _leaky_relu_backward_kernel,
            pieces * ceil_div(channels, columns),
            (gradient, output, partials),
            (pixels, piece, negative_slope),
            {"CHANNELS": channels, "ROWS": rows, "COLUMNS": columns, "num_warps": WARPS, "enable_fp_fusion": False},
        )
    return partials


def sum_partials(partials: Sequence[Tensor], scale: Tensor | None = None) -> list[Tensor]:
    """The column sums of partial sums, in a fixed order, in one launch.

    Args:
        partials: one to three, float32 ``[rows, K]`` contiguous, on a GPU (on the CPU in Triton's interpreter).
        scale: 0-d float32 on the same device, multiplies the sums.

    Returns:
        Float32 ``[K]`` of each.
    """
    channels, rows = [each.shape[1] for each in partials], [each.shape[0] for each in partials]
    totals = [torch.empty((count,), dtype=torch.float32, device=partials[0].device) for count in channels]
    # Where there are fewer the first one stands in, with no program of its own.
    places = [*range(len(partials)), *(0,) * (SUMS - len(partials))]
    columns = [*channels, *(0,) * (SUMS - len(partials))]
    with device_guard(partials[0].device):
        launch(
            _sum_partials_kernel,
            sum(ceil_div(count, SUM_COLUMNS) for count in channels),
            (
                *(partials[place] for place in places),
                partials[0] if scale is None else scale,
                *(totals[place] for place in places),
            ),
            (*(rows[place] for place in places),),
            {
                "CHANNELS0": columns[0],
                "CHANNELS1": columns[1],
                "CHANNELS2": columns[2],
                "ROWS": SUM_ROWS,
                "COLUMNS": SUM_COLUMNS,
                "HAS_SCALE": scale is not None,
                "num_warps": SUM_WARPS,
                "enable_fp_fusion": False,
            },
        )
    return totals
