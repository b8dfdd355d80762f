"""Triton kernels of a whole head's forward for large maps: layer i of teacher and student in one grid.

A layer of one side alone leaves the last of its waves of programs a quarter full; two layers in one grid share theirs.
Three launches convolve, a fourth computes the loss and what backward needs (:mod:`ftfast.kernels.ft_head_loss`).
"""

# mypy: disallow-incomplete-defs=False
# (a kernel's parameters carry Triton's annotations, and only where Triton needs one)

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import conv3x3_tiles, ft_head_tiles
from .conv3x3 import TAPS, conv3x3_forward
from .conv3x3_accumulate import accumulate_taps
from .conv3x3_epilogues import store_activated_tile
from .ft_head_loss import head_loss
from .launch import device_guard
from .map_descriptors import describe


class Kept(NamedTuple):
    """What backward needs besides the student's features: the outputs of its first two layers ``[N, H, W, channels]``,
    and the loss's gradient as :func:`ftfast.kernels.ft_head_loss.head_loss` keeps it.
    """

    a1: Tensor
    a2: Tensor
    direction: Tensor
    inverse_norm: Tensor


class Side(NamedTuple):
    """One side's convolution: ``y = leaky_relu(conv(x) + bias)``."""

    x: Tensor
    weight: Tensor
    bias: Tensor
    y: Tensor
    negative_slope: float


@triton.jit
def _activated_tile(
    x,
    weight,
    bias,
    y,
    negative_slope,
    program,
    pixels,
    height,
    width,
    taps,
    CHANNELS: tl.constexpr,
    PADDED_CHANNELS: tl.constexpr,
    CHANNELS_OUT: tl.constexpr,
    COLUMNS: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
    BC: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    COLUMN_TILES: tl.constexpr = (COLUMNS + BK - 1) // BK
    first_pixel = (program // COLUMN_TILES) * BM
    first_column = (program % COLUMN_TILES) * BK
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
        True,
        DESCRIPTORS,
    )


# A constant number of taps would be unrolled.
@triton.jit(do_not_specialize=["first_programs", "pixels", "height", "width", "taps"])
def _grouped_forward_kernel(
    first_x,  # [N, H, W, FIRST_CHANNELS]
    first_weight,  # [9 * FIRST_PADDED, FIRST_COLUMNS]
    first_y,  # [N, H, W, FIRST_OUT]
    second_x,
    second_weight,
    second_y,
    first_bias,  # [FIRST_OUT]
    second_bias,
    first_slope: tl.float32,
    second_slope: tl.float32,
    first_programs,
    pixels,
    height,
    width,
    taps,
    FIRST_CHANNELS: tl.constexpr,
    FIRST_PADDED: tl.constexpr,
    FIRST_OUT: tl.constexpr,
    FIRST_COLUMNS: tl.constexpr,
    FIRST_BC: tl.constexpr,
    SECOND_CHANNELS: tl.constexpr,
    SECOND_PADDED: tl.constexpr,
    SECOND_OUT: tl.constexpr,
    SECOND_COLUMNS: tl.constexpr,
    SECOND_BC: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    """``y = leaky_relu(conv(x) + bias)`` of two sides; the first programs own ``[BM, BK]`` of the first's y."""
    program = tl.program_id(0)
    if program < first_programs:
        _activated_tile(
            first_x,
            first_weight,
            first_bias,
            first_y,
            first_slope,
            program,
            pixels,
            height,
            width,
            taps,
            FIRST_CHANNELS,
            FIRST_PADDED,
            FIRST_OUT,
            FIRST_COLUMNS,
            BM,
            BK,
            FIRST_BC,
            DESCRIPTORS,
            INPUT_PRECISION,
        )
    else:
        _activated_tile(
            second_x,
            second_weight,
            second_bias,
            second_y,
            second_slope,
            program - first_programs,
            pixels,
            height,
            width,
            taps,
            SECOND_CHANNELS,
            SECOND_PADDED,
            SECOND_OUT,
            SECOND_COLUMNS,
            BM,
            BK,
            SECOND_BC,
            DESCRIPTORS,
            INPUT_PRECISION,
        )


def _convolve_both(first: Side, second: Side, input_precision: str) -> None:
    """One launch; the side that sums over more channels first, so that the shorter programs end the grid."""
    if first.x.shape[3] < second.x.shape[3]:
        first, second = second, first
    _, height, width, _ = first.x.shape
    pixels, device = first.x.shape[:3].numel(), first.x.device
    table = conv3x3_tiles.table(first.x, first.y, second.x, second.y)
    descriptors = conv3x3_tiles.copied_by(table)
    outputs = (first.y.shape[3], second.y.shape[3])
    multiprocessors = conv3x3_tiles.multiprocessors(device)
    tile = ft_head_tiles.forward_tile(table, first.x.dtype, outputs, pixels, multiprocessors)
    rounded = input_precision == "tf32"
    operands: list[Any] = []
    constants: dict[str, int] = {}
    programs = []
    for name, side in (("FIRST", first), ("SECOND", second)):
        channels, channels_out, columns = side.x.shape[3], side.y.shape[3], side.weight.shape[1]
        padded = side.weight.shape[0] // TAPS
        block = min(tile.channels, padded)
        if descriptors:
            operands += [
                describe(side.x.view(pixels, channels), tile.pixels, block, rounded=rounded),
                describe(side.weight, block, tile.columns, rounded=rounded),
                describe(side.y.view(pixels, channels_out), tile.pixels, tile.columns),
            ]
        else:
            operands += [side.x, side.weight, side.y]
        constants |= {
            f"{name}_CHANNELS": channels,
            f"{name}_PADDED": padded,
            f"{name}_OUT": channels_out,
            f"{name}_COLUMNS": columns,
            f"{name}_BC": block,
        }
        programs.append(triton.cdiv(pixels, tile.pixels) * triton.cdiv(columns, tile.columns))
    with device_guard(device):
        _grouped_forward_kernel[(sum(programs),)](
            *operands,
            first.bias,
            second.bias,
            first.negative_slope,
            second.negative_slope,
            programs[0],
            pixels,
            height,
            width,
            TAPS,
            BM=tile.pixels,
            BK=tile.columns,
            DESCRIPTORS=descriptors,
            INPUT_PRECISION=input_precision,
            **constants,
            num_warps=tile.warps,
            num_stages=tile.stages,
            enable_fp_fusion=True,
        )


def grouped_head_forward(
    student: Tensor,
    teacher: Tensor | None,
    teacher_factor: Tensor | None,
    student_weights: list[Tensor],
    student_biases: list[Tensor],
    teacher_weights: list[Tensor],
    teacher_biases: list[Tensor],
    *,
    p: int,
    reduction: str,
    eps: float,
    weight: float | Tensor,
    student_slope: float,
    teacher_slope: float,
    input_precision: str = "tf32",
) -> tuple[Tensor, Kept]:
    """The loss of a head and what its backward needs, in four launches.

    Args:
        student: ``[N, H, W, Cs]`` contiguous, float32, bfloat16 or float16, no size 0, on a GPU (on the CPU in Triton's
            interpreter). Nothing is checked here.
        teacher: ``[N, H, W, Ct]``, likewise, in the same dtype; or None with
        teacher_factor: ``[N, H, W, K]`` contiguous, of any float dtype, int8 or float8_e4m3fn: the teacher's stack is
            then left out.
        student_weights, teacher_weights: three ``.forward`` of :func:`ftfast.kernels.pack_weights.pack_weights` each,
            in the dtype of the maps. Of a known factor's teacher nothing is read.
        student_biases, teacher_biases: three each, float32.
        p, reduction, eps, weight: as :func:`ftfast.kernels.ft_head_loss.head_loss`.
        student_slope, teacher_slope: of LeakyReLU, above 0.
        input_precision: of float32 products, "tf32" or "tf32x3"; sums are float32 for every dtype.

    Returns:
        The loss, float32, 0-d or ``[N]``, and :class:`Kept`.
    """
    outputs = [student]
    for layer in range(3):
        x, packed, bias = outputs[-1], student_weights[layer], student_biases[layer]
        if teacher_factor is not None:
            y = conv3x3_forward(
                x,
                packed,
                bias,
                channels_out=bias.shape[0],
                negative_slope=student_slope,
                input_precision=input_precision,
            )
        else:
            assert teacher is not None
            y = torch.empty((*x.shape[:3], bias.shape[0]), dtype=x.dtype, device=x.device)
            teacher_bias = teacher_biases[layer]
            teacher_y = torch.empty((*x.shape[:3], teacher_bias.shape[0]), dtype=x.dtype, device=x.device)
            _convolve_both(
                Side(teacher, teacher_weights[layer], teacher_bias, teacher_y, teacher_slope),
                Side(x, packed, bias, y, student_slope),
                input_precision,
            )
            teacher = teacher_y
        outputs.append(y)
    target = teacher if teacher_factor is None else teacher_factor
    assert target is not None
    loss, direction, inverse_norm = head_loss(
        outputs[3],
        target,
        p=p,
        reduction=reduction,
        eps=eps,
        weight=weight,
        negative_slope=student_slope,
    )
    return loss, Kept(outputs[1], outputs[2], direction, inverse_norm)
