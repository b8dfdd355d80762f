"""Triton kernels of a 3x3 convolution's weight gradient and of its bias gradient: two launches.

``dW[k, c, ky, kx] = sum over pixels p of x[p + shift(tap), c] * dz[p, k]``, with ``tap = 3 * ky + kx``. The pixels are
split among programs; the second launch adds the splits up in a fixed order, so a result is bit-equal from run to run.
"""

# mypy: disallow-incomplete-defs=False
# (a kernel's parameters carry Triton's annotations, and only where Triton needs one)

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import conv3x3_tiles
from .conv3x3_accumulate import accumulate_pixels as accumulate_pixels
from .conv3x3_accumulate import lines, steps_over
from .launch import device_guard
from .map_descriptors import describe

TAPS = 9
# Pixels that one program adds up for the bias gradient, and the rows it reads at once.
BIAS_PIECE = 256
BIAS_ROWS = 32
# The second launch: a program's outputs and inputs (all taps of them), and its columns of the bias gradient.
SUM_OUTPUTS = 32
SUM_INPUTS = 8
SUM_COLUMNS = 128
SUM_WARPS = 4

_RUNTIME_NUMBERS = ["samples", "height", "width", "splits"]


@triton.jit
def _store_column_sums(
    dz,
    partials,
    piece,
    first_column,
    pixels,
    COLUMNS: tl.constexpr,
    BK: tl.constexpr,
    PIECE: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Row ``piece`` of ``partials [pieces, COLUMNS]``: the sums of PIECE rows of ``dz [pixels, COLUMNS]``."""
    lane = tl.arange(0, ROWS)
    column = first_column + tl.arange(0, BK)
    sums = tl.zeros((ROWS, BK), tl.float32)
    for start in range(0, PIECE, ROWS):
        row = piece * PIECE + start
        mask = (row + lane < pixels)[:, None] & (column < COLUMNS)[None, :]
        offsets = lane[:, None] * COLUMNS + column[None, :]
        sums += tl.load(dz + row.to(tl.int64) * COLUMNS + offsets, mask=mask, other=0.0).to(tl.float32)
    tl.store(partials + piece.to(tl.int64) * COLUMNS + column, tl.sum(sums, 0), mask=column < COLUMNS)


@triton.jit(do_not_specialize=_RUNTIME_NUMBERS)
def _conv3x3_weight_gradient_kernel(
    x,
    dz,
    dz_map,
    partials,
    bias_partials,
    samples,
    height,
    width,
    splits,
    CHANNELS: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    BK: tl.constexpr,
    IMAGES: tl.constexpr,
    ACROSS: tl.constexpr,
    BIAS_PIECE: tl.constexpr,
    BIAS_ROWS: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    """``partials [splits, 9, C, K]`` from x ``[N, H, W, C]`` and dz ``[N, H, W, K]``, and after it the bias's.

    The first programs own a tile of one tap and one split each; those after them, if any, a piece of dz's column sums
    ``bias_partials [pieces, K]``. ``dz_map`` points to what dz is.
    """
    ROW_TILES: tl.constexpr = (CHANNELS + ROWS - 1) // ROWS
    COLUMN_TILES: tl.constexpr = (COLUMNS + BK - 1) // BK
    program = tl.program_id(0)
    if program < splits * (9 * ROW_TILES * COLUMN_TILES):
        # Neighbours are the taps of one tile: they read the same pixels.
        tap = program % 9
        tile = (program // 9) % (ROW_TILES * COLUMN_TILES)
        split = program // (9 * ROW_TILES * COLUMN_TILES)
        first_row = (tile // COLUMN_TILES) * ROWS
        first_column = (tile % COLUMN_TILES) * BK
        steps = tl.cdiv(samples, IMAGES) * height * tl.cdiv(width, ACROSS)
        length = tl.cdiv(steps, splits)
        first_step = split * length
        last_step = tl.minimum(first_step + length, steps)
        accumulator = accumulate_pixels(
            x,
            dz,
            tap,
            first_row,
            first_column,
            first_step,
            last_step,
            samples,
            height,
            width,
            CHANNELS,
            COLUMNS,
            ROWS,
            BK,
            IMAGES,
            ACROSS,
            DESCRIPTORS,
            INPUT_PRECISION,
        )
        row = first_row + tl.arange(0, ROWS)
        column = first_column + tl.arange(0, BK)
        start = partials + (split * 9 + tap).to(tl.int64) * (CHANNELS * COLUMNS)
        mask = (row < CHANNELS)[:, None] & (column < COLUMNS)[None, :]
        tl.store(start + row[:, None] * COLUMNS + column[None, :], accumulator, mask=mask)
    else:
        program -= splits * (9 * ROW_TILES * COLUMN_TILES)
        _store_column_sums(
            dz_map,
            bias_partials,
            program // COLUMN_TILES,
            (program % COLUMN_TILES) * BK,
            samples * height * width,
            COLUMNS,
            BK,
            BIAS_PIECE,
            BIAS_ROWS,
        )


@triton.jit(do_not_specialize=["splits", "pieces"])
def _sum_weight_gradient_kernel(
    partials,
    bias_partials,
    scale,
    dw,
    db,
    splits,
    pieces,
    CHANNELS: tl.constexpr,
    COLUMNS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    INPUTS: tl.constexpr,
    BIAS_COLUMNS: tl.constexpr,
    HAS_SCALE: tl.constexpr,
):
    """``dw [K, C, 3, 3] = scale * sum of partials [splits, 9, C, K]``, ``db [K]`` likewise from ``[pieces, K]``.

    The first programs own OUTPUTS by INPUTS weights, all taps of them; those after them BIAS_COLUMNS of db. One split
    has fewer than 2**31 numbers.
    """
    TILES: tl.constexpr = ((COLUMNS + OUTPUTS - 1) // OUTPUTS) * ((CHANNELS + INPUTS - 1) // INPUTS)
    program = tl.program_id(0)
    factor = 1.0
    if HAS_SCALE:
        factor = tl.load(scale)
    if program < TILES:
        k = (program % ((COLUMNS + OUTPUTS - 1) // OUTPUTS)) * OUTPUTS + tl.arange(0, OUTPUTS)[:, None, None]
        c = (program // ((COLUMNS + OUTPUTS - 1) // OUTPUTS)) * INPUTS + tl.arange(0, INPUTS)[None, :, None]
        tap = tl.arange(0, 16)[None, None, :]
        mask = (k < COLUMNS) & (c < CHANNELS) & (tap < 9)
        source = (tap * CHANNELS + c) * COLUMNS + k
        total = tl.zeros((OUTPUTS, INPUTS, 16), tl.float32)
        for _ in range(splits):
            total += tl.load(partials + source, mask=mask, other=0.0)
            partials += 9 * CHANNELS * COLUMNS
        tl.store(dw + (k * CHANNELS + c) * 9 + tap, total * factor, mask=mask)
    else:
        column = (program - TILES) * BIAS_COLUMNS + tl.arange(0, BIAS_COLUMNS)
        sums = tl.zeros((BIAS_COLUMNS,), tl.float32)
        for _ in range(pieces):
            sums += tl.load(bias_partials + column, mask=column < COLUMNS, other=0.0)
            bias_partials += COLUMNS
        tl.store(db + column, sums * factor, mask=column < COLUMNS)


def conv3x3_weight_gradient(
    x: Tensor,
    dz: Tensor,
    *,
    bias: bool,
    scale: Tensor | None = None,
    input_precision: str = "tf32",
) -> tuple[Tensor, Tensor | None]:
    """The gradients of a 3x3 convolution's weight and bias.

    Args:
        x: ``[N, H, W, C]`` contiguous, the convolution's input, float32, bfloat16 or float16, no size 0, on a GPU (on
            the CPU in Triton's interpreter). Nothing is checked here.
        dz: ``[N, H, W, K]`` contiguous, the gradient of its result, in the dtype of x. A transposed convolution's
            weight ``[in, out, 3, 3]`` takes the two exchanged.
        bias: whether the bias's gradient, the sum of dz over pixels, is wanted.
        scale: 0-d float32 on the device of x, multiplies both.
        input_precision: of float32 products, "tf32" or "tf32x3"; sums are float32 for every dtype.

    Returns:
        ``[K, C, 3, 3]`` contiguous and ``[K]`` (None without bias), float32.
    """
    samples, height, width, channels = x.shape
    columns, device = dz.shape[3], x.device
    table = conv3x3_tiles.table(x, dz)
    tile = conv3x3_tiles.weight_tile(table, x.dtype, channels, columns)
    images, across = lines(width, tile.pixels)
    tiles = TAPS * triton.cdiv(channels, tile.rows) * triton.cdiv(columns, tile.columns)
    steps = steps_over(samples, height, width, images, across)
    splits = conv3x3_tiles.splits(tiles, steps, conv3x3_tiles.multiprocessors(device))
    pieces = triton.cdiv(samples * height * width, BIAS_PIECE) if bias else 0
    partials = torch.empty((splits, TAPS, channels, columns), dtype=torch.float32, device=device)
    bias_partials = torch.empty((pieces, columns), dtype=torch.float32, device=device) if bias else partials
    dw = torch.empty((columns, channels, 3, 3), dtype=torch.float32, device=device)
    db = torch.empty((columns,), dtype=torch.float32, device=device) if bias else None
    operands: list[Any] = [x, dz]
    descriptors = conv3x3_tiles.copied_by(table)
    if descriptors:
        rounded = input_precision == "tf32"
        operands = [
            describe(x, images, 1, across, tile.rows, rounded=rounded),
            describe(dz, images, 1, across, tile.columns, rounded=rounded),
        ]
    with device_guard(device):
        _conv3x3_weight_gradient_kernel[(tiles * splits + pieces * triton.cdiv(columns, tile.columns),)](
            *operands,
            dz,
            partials,
            bias_partials,
            samples,
            height,
            width,
            splits,
            CHANNELS=channels,
            COLUMNS=columns,
            ROWS=tile.rows,
            BK=tile.columns,
            IMAGES=images,
            ACROSS=across,
            BIAS_PIECE=BIAS_PIECE,
            BIAS_ROWS=BIAS_ROWS,
            DESCRIPTORS=descriptors,
            INPUT_PRECISION=input_precision,
            num_warps=tile.warps,
            num_stages=tile.stages,
            enable_fp_fusion=True,
        )
        sum_tiles = triton.cdiv(columns, SUM_OUTPUTS) * triton.cdiv(channels, SUM_INPUTS)
        _sum_weight_gradient_kernel[(sum_tiles + (triton.cdiv(columns, SUM_COLUMNS) if bias else 0),)](
            partials,
            bias_partials,
            partials if scale is None else scale,
            dw,
            dw if db is None else db,
            splits,
            pieces,
            CHANNELS=channels,
            COLUMNS=columns,
            OUTPUTS=SUM_OUTPUTS,
            INPUTS=SUM_INPUTS,
            BIAS_COLUMNS=SUM_COLUMNS,
            HAS_SCALE=scale is not None,
            num_warps=SUM_WARPS,
            enable_fp_fusion=False,
        )
    return dw, db
