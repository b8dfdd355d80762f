"""Triton kernels of a whole head's backward for large maps: both gradients of a layer in one grid.

Five launches: the last pre-activation's gradient at one scale for the batch; for each layer, the last one first, the
pieces of its weight's gradient and behind them the tiles of its input's; and the sums of all pieces, in a fixed order,
so that a result is bit-equal from run to run.
"""

# mypy: disallow-incomplete-defs=False
# (a kernel's parameters carry Triton's annotations, and only where Triton needs one)

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import conv3x3_tiles, ft_head_tiles
from .conv3x3 import TAPS
from .conv3x3_accumulate import accumulate_pixels, accumulate_taps, lines, steps_over
from .conv3x3_epilogues import store_gradient_tile
from .ft_head_gradient_sums import sum_gradients
from .ft_head_grouped import Kept
from .ft_head_loss import scaled_direction
from .launch import device_guard
from .map_descriptors import describe


@triton.jit
def _store_weight_piece(
    x_lines,
    dz_lines,
    partials,
    program,
    splits,
    samples,
    height,
    width,
    CHANNELS: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    BK: tl.constexpr,
    IMAGES: tl.constexpr,
    ACROSS: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    COLUMN_TILES: tl.constexpr = (COLUMNS + BK - 1) // BK
    TILES: tl.constexpr = ((CHANNELS + ROWS - 1) // ROWS) * COLUMN_TILES
    # Neighbours are the taps of one tile: they read the same pixels.
    tap = program % 9
    tile = (program // 9) % TILES
    split = program // (9 * TILES)
    first_row = (tile // COLUMN_TILES) * ROWS
    first_column = (tile % COLUMN_TILES) * BK
    steps = tl.cdiv(samples, IMAGES) * height * tl.cdiv(width, ACROSS)
    length = tl.cdiv(steps, splits)
    accumulator = accumulate_pixels(
        x_lines,
        dz_lines,
        tap,
        first_row,
        first_column,
        split * length,
        tl.minimum((split + 1) * length, steps),
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
    partials += (split * 9 + tap).to(tl.int64) * (CHANNELS * COLUMNS)
    mask = (row < CHANNELS)[:, None] & (column < COLUMNS)[None, :]
    tl.store(partials + row[:, None] * COLUMNS + column[None, :], accumulator, mask=mask)


# A constant number of taps would be unrolled.
@triton.jit(do_not_specialize=["weight_programs", "splits", "samples", "height", "width", "taps"])
def _grouped_backward_kernel(
    dz,  # [N, H, W, COLUMNS]
    weight,  # [9 * PADDED_COLUMNS, PADDED_CHANNELS]
    dx,  # [N, H, W, CHANNELS]
    output,  # [N, H, W, CHANNELS]
    x_lines,  # [N, H, W, CHANNELS]
    dz_lines,  # [N, H, W, COLUMNS]
    partials,  # [splits, 9, CHANNELS, COLUMNS]
    column_sums,  # [tiles of pixels, CHANNELS]
    scale,
    negative_slope: tl.float32,
    weight_programs,
    splits,
    samples,
    height,
    width,
    taps,
    CHANNELS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PADDED_CHANNELS: tl.constexpr,
    PADDED_COLUMNS: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
    BC: tl.constexpr,
    ROWS: tl.constexpr,
    PIECE_COLUMNS: tl.constexpr,
    IMAGES: tl.constexpr,
    ACROSS: tl.constexpr,
    HAS_OUTPUT: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    """``dx = conv_transposed(dz) * slope(output)`` or, without output, ``* scale``; and the weight's gradient.

    The first programs own a tile of one tap and one split of ``partials``, those behind them ``[BM, BK]`` of dx and of
    its column sums. ``x_lines`` and ``dz_lines`` are the layer's input and dz, described for tiles of lines.
    """
    program = tl.program_id(0)
    if program < weight_programs:
        _store_weight_piece(
            x_lines,
            dz_lines,
            partials,
            program,
            splits,
            samples,
            height,
            width,
            CHANNELS,
            COLUMNS,
            ROWS,
            PIECE_COLUMNS,
            IMAGES,
            ACROSS,
            DESCRIPTORS,
            INPUT_PRECISION,
        )
    else:
        COLUMN_TILES: tl.constexpr = (PADDED_CHANNELS + BK - 1) // BK
        first_pixel = ((program - weight_programs) // COLUMN_TILES) * BM
        first_column = ((program - weight_programs) % COLUMN_TILES) * BK
        pixels = samples * height * width
        accumulator = accumulate_taps(
            dz,
            weight,
            first_pixel,
            first_column,
            pixels,
            height,
            width,
            taps,
            COLUMNS,
            PADDED_COLUMNS,
            PADDED_CHANNELS,
            BM,
            BK,
            BC,
            DESCRIPTORS,
            INPUT_PRECISION,
        )
        factor = 1.0
        if not HAS_OUTPUT:
            factor = tl.load(scale)
        store_gradient_tile(
            dx,
            output,
            column_sums,
            accumulator,
            factor,
            negative_slope,
            first_pixel,
            first_column,
            pixels,
            CHANNELS,
            BM,
            BK,
            HAS_OUTPUT,
            DESCRIPTORS,
        )


class _Gradients(NamedTuple):
    """What one layer's grid computes: dx, its column sums, the pieces of the weight's gradient."""

    dx: Tensor | None
    column_sums: Tensor | None
    partials: Tensor


def _layer_gradients(
    x: Tensor,
    dz: Tensor,
    packed_backward: Tensor,
    scale: Tensor,
    negative_slope: float,
    *,
    activated: bool,
    need_input: bool,
    input_precision: str,
) -> _Gradients:
    """One launch; ``activated``: x came out of LeakyReLU, and dx goes on through it instead of being final."""
    samples, height, width, channels = x.shape
    columns, device = dz.shape[3], x.device
    pixels = samples * height * width
    table = conv3x3_tiles.table(x, dz)
    descriptors = conv3x3_tiles.copied_by(table)
    multiprocessors = conv3x3_tiles.multiprocessors(device)
    convolution, piece = ft_head_tiles.backward_tile(table, x.dtype, channels, columns, pixels, multiprocessors)
    padded_channels, padded_columns = packed_backward.shape[1], packed_backward.shape[0] // TAPS
    block = min(convolution.channels, padded_columns)
    images, across = lines(width, piece.pixels)
    tiles_of_pixels = triton.cdiv(pixels, convolution.pixels)
    input_programs = tiles_of_pixels * triton.cdiv(padded_channels, convolution.columns) if need_input else 0
    weight_tiles = TAPS * triton.cdiv(channels, piece.rows) * triton.cdiv(columns, piece.columns)
    splits = ft_head_tiles.weight_splits(
        weight_tiles,
        steps_over(samples, height, width, images, across) * piece.pixels * piece.rows * piece.columns,
        TAPS * channels * columns * 4,
        input_programs,
        convolution.pixels * convolution.columns * TAPS * padded_columns,
        multiprocessors,
    )
    partials = torch.empty((splits, TAPS, channels, columns), dtype=torch.float32, device=device)
    dx = torch.empty_like(x) if need_input else None
    column_sums = None
    if activated:
        column_sums = torch.empty((tiles_of_pixels, channels), dtype=torch.float32, device=device)
    operands: list[Any] = [dz, packed_backward, x if dx is None else dx, x, x, dz]
    if descriptors:
        rounded = input_precision == "tf32"
        flat, half = (pixels, channels), (convolution.pixels, convolution.columns // 2)
        operands = [
            describe(dz.view(pixels, columns), convolution.pixels, block, rounded=rounded),
            describe(packed_backward, block, convolution.columns, rounded=rounded),
            describe((x if dx is None else dx).view(flat), *half),
            describe(x.view(flat), *half),
            describe(x, images, 1, across, piece.rows, rounded=rounded),
            describe(dz, images, 1, across, piece.columns, rounded=rounded),
        ]
    with device_guard(device):
        _grouped_backward_kernel[(weight_tiles * splits + input_programs,)](
            *operands,
            partials,
            partials if column_sums is None else column_sums,
            scale,
            negative_slope,
            weight_tiles * splits,
            splits,
            samples,
            height,
            width,
            TAPS,
            CHANNELS=channels,
            COLUMNS=columns,
            PADDED_CHANNELS=padded_channels,
            PADDED_COLUMNS=padded_columns,
            BM=convolution.pixels,
            BK=convolution.columns,
            BC=block,
            ROWS=piece.rows,
            PIECE_COLUMNS=piece.columns,
            IMAGES=images,
            ACROSS=across,
            HAS_OUTPUT=activated,
            DESCRIPTORS=descriptors,
            INPUT_PRECISION=input_precision,
            num_warps=convolution.warps,
            num_stages=convolution.stages,
            enable_fp_fusion=True,
        )
    return _Gradients(dx, column_sums, partials)


def grouped_head_backward(
    student: Tensor,
    kept: Kept,
    student_weights_backward: list[Tensor],
    upstream: Tensor,
    *,
    p: int,
    reduction: str,
    weight: float | Tensor,
    negative_slope: float,
    need_student_gradient: bool,
    input_precision: str = "tf32",
) -> tuple[Tensor | None, list[Tensor], list[Tensor]]:
    """The gradients of :func:`ftfast.kernels.ft_head_grouped.grouped_head_forward`, in five launches.

    Args:
        student: as forward got it.
        kept: as forward returned it; not changed.
        student_weights_backward: three ``.backward`` of :func:`ftfast.kernels.pack_weights.pack_weights`, in the dtype
            of the maps.
        upstream: the gradient of the loss, 0-d, or ``[N]`` with any stride for "none".
        p, reduction, weight, input_precision: as forward got them.
        negative_slope: the student's.
        need_student_gradient: whether dx is wanted.

    Returns:
        dx ``[N, H, W, C]`` contiguous in the dtype of the student's map, or None; the gradients of the three weights
        ``[K, C, 3, 3]`` contiguous and of the three biases ``[K]``, float32.
    """
    dz, sums, scale = scaled_direction(
        kept.direction, kept.inverse_norm, upstream, p=p, reduction=reduction, weight=weight
    )
    inputs = [student, kept.a1, kept.a2]
    partials: list[Tensor] = []
    column_sums = [sums]
    dx = None
    for layer in (2, 1, 0):
        dx, below, pieces = _layer_gradients(
            inputs[layer],
            dz,
            student_weights_backward[layer],
            scale,
            negative_slope,
            activated=layer > 0,
            need_input=layer > 0 or need_student_gradient,
            input_precision=input_precision,
        )
        partials.insert(0, pieces)
        if layer > 0:
            assert dx is not None
            assert below is not None
            dz = dx
            column_sums.insert(0, below)
    dws, dbs = sum_gradients(partials, column_sums, scale)
    return dx, dws, dbs
