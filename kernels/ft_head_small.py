"""Triton kernel of a small head in a single pass: six convolutions, both norms, the loss and its direction, one launch.

One program owns one image and computes both sides for it: teacher ``[H*W, Ct] -> Ct -> K -> K`` and student
``Cs -> Cs -> K -> K``, each ``z = conv3x3(x) + bias``, ``y = leaky_relu(z)``, then loss and direction as in
ft_head_loss.py. Maps between convolutions go through global memory, where a barrier makes them visible to the program
that wrote them. Kept for backward: the student's two maps in between, the direction, the reciprocal norms.

Kim, Park, Kwak, "Paraphrasing Complex Network: Network Compression via Factor Transfer", NeurIPS 2018, section 3.
"""

# mypy: disallow-incomplete-defs=False
# (a kernel's parameters carry Triton's annotations, and only where Triton needs one)

from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .device import arrival_counters, capability, device_guard
from .ft_head_loss import direction_of, finish_loss
from .image_tiles import convolve_image, load_image, store_image
from .launch import launch, power_of_2
from .loss_numbers import norm_floor, reduction_scale, split_weight
from .loss_terms import reciprocal_distance, reciprocal_norm, square_root, terms_of
from .pack_weights import padded_channels

TAPS = 9
OLD_TRITON = tuple(int(part) for part in triton.__version__.split(".")[:2]) < (3, 9)
FOLD_BLOCK = 512
# What one program can hold of an image without a spill: pixels, numbers of 16 bits of a map and of a factor.
MOST_PIXELS = 64
MOST_MAP = 64 * 256
MOST_FACTOR = 64 * 128
WIDEST_BLOCK = 64


class Kept(NamedTuple):
    """What backward needs: two maps and the direction, ``[N, H, W, C]``, and the reciprocal norms ``[N]``."""

    a1: Tensor
    a2: Tensor
    direction: Tensor
    inverse_norm: Tensor


@triton.jit
def _layer(
    x,
    weight,
    bias,
    height,
    width,
    taps,
    negative_slope,
    CHANNELS_IN: tl.constexpr,
    PADDED_IN: tl.constexpr,
    CHANNELS_OUT: tl.constexpr,
    PADDED_OUT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    """``leaky_relu(conv(x) + bias)`` of one image, zeros in the padding of rows and columns."""
    z = convolve_image(x, weight, height, width, taps, CHANNELS_IN, PADDED_IN, PADDED_OUT, ROWS, BLOCK, INPUT_PRECISION)
    column = tl.arange(0, PADDED_OUT)
    z += tl.load(bias + column, mask=column < CHANNELS_OUT, other=0.0)[None, :]
    z = tl.where((tl.arange(0, ROWS) < height * width)[:, None], z, 0.0)
    return tl.where(z > 0, z, z * negative_slope)


@triton.jit(do_not_specialize=["height", "width", "samples", "taps"])
def _small_head_forward_kernel(
    student,  # [N, H, W, Cs]
    teacher,  # [N, H, W, Ct]
    factor,  # [N, H, W, K]: the teacher's, given, or scratch to write it to
    scratch,  # [N, H, W, Ct + K]: the teacher's maps in between
    student_weight0,  # packed [9 * Cp, Kp] all six
    student_weight1,
    student_weight2,
    student_bias0,
    student_bias1,
    student_bias2,
    teacher_weight0,
    teacher_weight1,
    teacher_weight2,
    teacher_bias0,
    teacher_bias1,
    teacher_bias2,
    a1,  # [N, H, W, Cs]
    a2,  # [N, H, W, K]
    direction,  # [N, H, W, K]
    inverse_norm,  # [N]
    distances,  # [N]
    loss,
    counter,
    weight,
    height,
    width,
    samples,
    taps,
    eps: tl.float64,
    scale: tl.float64,
    student_slope: tl.float32,
    teacher_slope: tl.float32,
    STUDENT_CHANNELS: tl.constexpr,
    TEACHER_CHANNELS: tl.constexpr,
    FACTOR_CHANNELS: tl.constexpr,
    STUDENT_PADDED: tl.constexpr,
    TEACHER_PADDED: tl.constexpr,
    FACTOR_PADDED: tl.constexpr,
    STUDENT_BLOCK: tl.constexpr,
    TEACHER_BLOCK: tl.constexpr,
    FACTOR_BLOCK: tl.constexpr,
    FACTOR_KNOWN: tl.constexpr,
    P: tl.constexpr,
    PER_SAMPLE: tl.constexpr,
    WEIGHTED: tl.constexpr,
    ROWS: tl.constexpr,
    FOLD: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64)
    pixels = height * width
    factor += n * pixels * FACTOR_CHANNELS
    if not FACTOR_KNOWN:
        teacher += n * pixels * TEACHER_CHANNELS
        first = scratch + n * pixels * (TEACHER_CHANNELS + FACTOR_CHANNELS)
        second = first + pixels * TEACHER_CHANNELS
        y = _layer(
            teacher, teacher_weight0, teacher_bias0, height, width, taps, teacher_slope, TEACHER_CHANNELS,
            TEACHER_PADDED, TEACHER_CHANNELS, TEACHER_PADDED, ROWS, TEACHER_BLOCK, INPUT_PRECISION,
        )  # fmt: skip
        store_image(first, y, pixels, TEACHER_CHANNELS, TEACHER_PADDED, ROWS)
        tl.debug_barrier()
        y = _layer(
            first, teacher_weight1, teacher_bias1, height, width, taps, teacher_slope, TEACHER_CHANNELS,
            TEACHER_PADDED, FACTOR_CHANNELS, FACTOR_PADDED, ROWS, TEACHER_BLOCK, INPUT_PRECISION,
        )  # fmt: skip
        store_image(second, y, pixels, FACTOR_CHANNELS, FACTOR_PADDED, ROWS)
        tl.debug_barrier()
        y = _layer(
            second, teacher_weight2, teacher_bias2, height, width, taps, teacher_slope, FACTOR_CHANNELS,
            FACTOR_PADDED, FACTOR_CHANNELS, FACTOR_PADDED, ROWS, FACTOR_BLOCK, INPUT_PRECISION,
        )  # fmt: skip
        # Held in registers over the student's convolutions it would make larger heads spill.
        store_image(factor, y, pixels, FACTOR_CHANNELS, FACTOR_PADDED, ROWS)
    student += n * pixels * STUDENT_CHANNELS
    a1 += n * pixels * STUDENT_CHANNELS
    a2 += n * pixels * FACTOR_CHANNELS
    y = _layer(
        student, student_weight0, student_bias0, height, width, taps, student_slope, STUDENT_CHANNELS, STUDENT_PADDED,
        STUDENT_CHANNELS, STUDENT_PADDED, ROWS, STUDENT_BLOCK, INPUT_PRECISION,
    )  # fmt: skip
    store_image(a1, y, pixels, STUDENT_CHANNELS, STUDENT_PADDED, ROWS)
    tl.debug_barrier()
    y = _layer(
        a1, student_weight1, student_bias1, height, width, taps, student_slope, STUDENT_CHANNELS, STUDENT_PADDED,
        FACTOR_CHANNELS, FACTOR_PADDED, ROWS, STUDENT_BLOCK, INPUT_PRECISION,
    )  # fmt: skip
    store_image(a2, y, pixels, FACTOR_CHANNELS, FACTOR_PADDED, ROWS)
    tl.debug_barrier()
    s = _layer(
        a2, student_weight2, student_bias2, height, width, taps, student_slope, FACTOR_CHANNELS, FACTOR_PADDED,
        FACTOR_CHANNELS, FACTOR_PADDED, ROWS, FACTOR_BLOCK, INPUT_PRECISION,
    )  # fmt: skip
    t = load_image(factor, pixels, FACTOR_CHANNELS, FACTOR_PADDED, ROWS)
    floor = tl.full((), eps, tl.float32)
    student_inverse, clamped = reciprocal_norm(tl.sum(tl.sum(s * s, 1), 0), floor)
    teacher_inverse, _ = reciprocal_norm(tl.sum(tl.sum(t * t, 1), 0), floor)
    distance_sum, product_sum, _ = terms_of(s * student_inverse, t * teacher_inverse, P)
    distance = tl.sum(tl.sum(distance_sum, 1), 0)
    product = tl.sum(tl.sum(product_sum, 1), 0)
    unit = 1.0
    if P == 2:
        distance = square_root(distance)
        unit = reciprocal_distance(distance, square_root((pixels * FACTOR_CHANNELS).to(tl.float32)))
        product *= unit
    product = tl.where(clamped, 0.0, product)
    d = direction_of(s, t, student_inverse, teacher_inverse, product, unit, student_slope, P)
    store_image(direction + n * pixels * FACTOR_CHANNELS, d, pixels, FACTOR_CHANNELS, FACTOR_PADDED, ROWS)
    tl.store(inverse_norm + n, student_inverse)
    finish_loss(loss, distances, counter, weight, distance, n, samples, scale, PER_SAMPLE, WEIGHTED, FOLD)


def small_head_fits(
    device: torch.device,
    dtype: torch.dtype,
    height: int,
    width: int,
    teacher_channels: int | None,
    student_channels: int,
    factor_channels: int,
) -> str:
    """Why a head is too large for one program an image, or "" where it fits."""
    if height * width > MOST_PIXELS:
        return f"maps of {height}x{width} have more than {MOST_PIXELS} pixels"
    units = rows_for(height * width) * (dtype.itemsize // 2)
    if padded_channels(factor_channels) * units > MOST_FACTOR:
        return f"a factor of {factor_channels} channels on {height}x{width} is too large for one program"
    sides = (("teacher", teacher_channels or 1), ("student", student_channels), ("factor", factor_channels))
    for side, channels in sides:
        # A block's sizes are powers of two.
        if channels > 64 and power_of_2(channels) != padded_channels(channels):
            return f"the {side}'s {channels} channels are neither up to 64 nor a power of two"
        if padded_channels(channels) * units > MOST_MAP:
            return f"the {side}'s {channels} channels on {height}x{width} are too many for one program"
    if OLD_TRITON and capability(device) == 100:
        return f"Triton {triton.__version__} does not compile it for this device, 3.9 does"
    return ""


def warps_for(*channels: int) -> int:
    """Warps of a program whose widest product has so many columns."""
    return 4 if max(padded_channels(count) for count in channels) <= 64 else 8


def stages_for(device: torch.device, *channels: int) -> int:
    """Stages of a program's products; older versions of Triton spill with three where registers are few."""
    few = capability(device) == 80 or max(channels) >= 512
    return 2 if OLD_TRITON and few else 3


def rows_for(pixels: int) -> int:
    """Rows of an image's tile: tensor cores want 16 at least."""
    return max(16, power_of_2(pixels))


@lru_cache(maxsize=1024)
def _constants(
    device: torch.device,
    channels: tuple[int, int, int],
    pixels: int,
    known: bool,
    p: int,
    per_sample: bool,
    weighted: bool,
) -> dict[str, Any]:
    student_channels, teacher_channels, factor_channels = channels
    padded = [padded_channels(count) for count in channels]
    return {
        "STUDENT_CHANNELS": student_channels,
        "TEACHER_CHANNELS": teacher_channels,
        "FACTOR_CHANNELS": factor_channels,
        "STUDENT_PADDED": padded[0],
        "TEACHER_PADDED": padded[1],
        "FACTOR_PADDED": padded[2],
        "STUDENT_BLOCK": min(padded[0], WIDEST_BLOCK),
        "TEACHER_BLOCK": min(padded[1], WIDEST_BLOCK),
        "FACTOR_BLOCK": min(padded[2], WIDEST_BLOCK),
        "FACTOR_KNOWN": known,
        "P": p,
        "PER_SAMPLE": per_sample,
        "WEIGHTED": weighted,
        "ROWS": rows_for(pixels),
        "FOLD": FOLD_BLOCK,
        "INPUT_PRECISION": "tf32",
        "num_warps": warps_for(student_channels, 1 if known else teacher_channels),
        "num_stages": stages_for(device, student_channels, 1 if known else teacher_channels),
        "enable_fp_fusion": False,
    }


def small_head_forward(
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
) -> tuple[Tensor, Kept]:
    """The whole forward of a head that :func:`small_head_fits`, in one launch.

    Args:
        student: ``[N, H, W, Cs]`` contiguous, float32, bfloat16 or float16, none of its sizes 0, on a GPU (on the CPU
            in Triton's interpreter). Nothing is checked here.
        teacher: ``[N, H, W, Ct]`` contiguous, in the student's dtype; or None.
        teacher_factor: ``[N, H, W, K]`` contiguous, also int8 or float8_e4m3fn, where the teacher is None.
        student_weights, teacher_weights: three each, packed forward in the student's dtype; the teacher's empty where
            its factor is given.
        student_biases, teacher_biases: three each, float32.
        p, reduction, eps, weight: as :func:`ftfast.ft_loss`.
        student_slope, teacher_slope: of the LeakyReLUs.

    Returns:
        The loss, float32, 0-d or ``[N]``, and what backward needs.
    """
    samples, height, width, student_channels = student.shape
    device, dtype = student.device, student.dtype
    factor_channels = student_biases[2].shape[0]
    known = teacher_factor is not None
    if teacher_factor is None:
        assert teacher is not None
        teacher_channels = teacher.shape[3]
        teacher_factor = torch.empty((samples, height, width, factor_channels), dtype=dtype, device=device)
        scratch = torch.empty((samples, height, width, teacher_channels + factor_channels), dtype=dtype, device=device)
    else:
        teacher, scratch, teacher_channels = student, student, 1
        teacher_weights, teacher_biases = student_weights, student_biases
    per_sample = reduction == "none"
    loss = torch.empty((samples,) if per_sample else (), dtype=torch.float32, device=device)
    norms_and_distances = torch.empty((2, samples), dtype=torch.float32, device=device)
    kept = Kept(
        torch.empty_like(student),
        torch.empty((samples, height, width, factor_channels), dtype=dtype, device=device),
        torch.empty((samples, height, width, factor_channels), dtype=dtype, device=device),
        norms_and_distances[0],
    )
    factor, weight_tensor = split_weight(weight, device)
    with device_guard(device):
        launch(
            _small_head_forward_kernel,
            samples,
            (
                student,
                teacher,
                teacher_factor,
                scratch,
                *student_weights,
                *student_biases,
                *teacher_weights,
                *teacher_biases,
                *kept,
                norms_and_distances[1],
                loss,
                loss if per_sample else arrival_counters(device),
                loss if weight_tensor is None else weight_tensor,
            ),
            (
                height,
                width,
                samples,
                TAPS,
                norm_floor(eps, torch.float32),
                reduction_scale(samples, height * width * factor_channels, p, reduction) * factor,
                student_slope,
                teacher_slope,
            ),
            {
                **_constants(
                    device,
                    (student_channels, teacher_channels, factor_channels),
                    height * width,
                    known,
                    p,
                    per_sample,
                    weight_tensor is not None,
                )
            },
        )
    return loss, kept
