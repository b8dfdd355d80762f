"""Triton kernel of the gradient at the end of a head: what the loss hands on into the last convolution.

Per sample, with a = s / max(|s|, eps) and b = t / max(|t|, eps) as in the loss alone, the gradient of the last
convolution's result before its LeakyReLU is

    dz = u * weight * scale / max(|s|, eps) * direction,    direction = (g - a <g, a>) * slope(s)

with g = sign(a - b) for p = 1, (a - b) / l for p = 2, u the upstream gradient and scale that of the reduction. The
direction is of size O(1) (for p = 2 times sqrt(D)), while in 16 bits dz itself would underflow, and over samples of
tiny norms overflow. So backward brings the samples to one scale, at which all its products are computed; what is left
of it multiplies the results once, in float32.

Kim, Park, Kwak, "Paraphrasing Complex Network: Network Compression via Factor Transfer", NeurIPS 2018, section 3.2.
"""

# mypy: disallow-incomplete-defs=False
# (a kernel's parameters carry Triton's annotations, and only where Triton needs one)

import torch
import triton
import triton.language as tl
from torch import Tensor

from ftfast.kernels.device import device_guard
from ftfast.kernels.launch import ceil_div, launch, power_of_2
from ftfast.kernels.loss_numbers import reduction_scale, split_weight
from ftfast.kernels.loss_terms import loss_factor, reciprocal_distance

# A program of scaled_direction: so many pixels of so many channels.
SCALED_ROWS = 64
SCALED_COLUMNS = 64
NORMS_BLOCK = 512


@triton.jit
def direction_of(x, y, student_inverse, teacher_inverse, product, unit, negative_slope, P: tl.constexpr):
    """The direction at elements x of s and y of t; product is <g, a>, unit what P = 2 multiplies a - b with."""
    a = x * student_inverse
    difference = a - y * teacher_inverse
    g = difference * unit
    if P == 1:
        # What is no number has no sign, and must come through.
        g = (difference > 0).to(tl.float32) - (difference < 0).to(tl.float32) + difference * 0.0
    return (g - a * product) * tl.where(x > 0, 1.0, negative_slope)


@triton.jit
def largest_factor(inverse_norm, upstream, samples, upstream_stride, BLOCK: tl.constexpr):
    """c, the largest ``|upstream * inverse_norm|``; 1 where that is no scale to divide by."""
    largest = tl.zeros((BLOCK,), tl.float32)
    for start in range(samples * 0, samples, BLOCK):
        row = start + tl.arange(0, BLOCK)
        factor = tl.load(inverse_norm + row, mask=row < samples, other=0.0)
        factor *= tl.load(upstream + row * upstream_stride, mask=row < samples, other=0.0).to(tl.float32)
        largest = tl.maximum(largest, tl.abs(factor))
    c = tl.max(largest, 0)
    return tl.where((c > 0) & (c < float("inf")), c, 1.0)


@triton.jit(do_not_specialize=["pixels", "map_size", "samples", "upstream_stride"])
def _scaled_direction_kernel(
    student,  # [N * H * W, K]: s, t
    teacher,
    statistics,  # [5, N]: as the loss's forward wrote it
    upstream,  # 0-d (stride 0) or [N]
    weight,
    scaled,  # [N * H * W, K]
    partials,  # [tiles of pixels, K]
    final,
    pixels,
    map_size,
    samples: tl.int64,
    upstream_stride: tl.int64,
    scale: tl.float64,
    root_of_size: tl.float32,
    negative_slope: tl.float32,
    CHANNELS: tl.constexpr,
    P: tl.constexpr,
    WEIGHTED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    NORMS: tl.constexpr,
):
    """``scaled = direction * upstream * inverse_norm / c`` and its column sums; ``final = c * scale * weight``."""
    COLUMN_TILES: tl.constexpr = (CHANNELS + COLUMNS - 1) // COLUMNS
    tile = tl.program_id(0) // COLUMN_TILES
    column = (tl.program_id(0) % COLUMN_TILES) * COLUMNS + tl.arange(0, COLUMNS)
    c = largest_factor(statistics, upstream, samples, upstream_stride, NORMS)
    row = tile * ROWS + tl.arange(0, ROWS)
    n = row // map_size
    given = row < pixels
    student_inverse = tl.load(statistics + n, mask=given, other=0.0)
    teacher_inverse = tl.load(statistics + samples + n, mask=given, other=0.0)
    product = tl.load(statistics + 2 * samples + n, mask=given, other=0.0)
    factor = student_inverse * tl.load(upstream + n * upstream_stride, mask=given, other=0.0).to(tl.float32) / c
    unit = 1.0
    if P == 2:
        distance = tl.load(statistics + 4 * samples + n, mask=given, other=0.0)
        unit = reciprocal_distance(distance, root_of_size)[:, None]
        product *= root_of_size
    mask = given[:, None] & (column < CHANNELS)[None, :]
    offsets = row.to(tl.int64)[:, None] * CHANNELS + column[None, :]
    x = tl.load(student + offsets, mask=mask, other=0.0).to(tl.float32)
    y = tl.load(teacher + offsets, mask=mask, other=0.0).to(tl.float32)
    inverses = student_inverse[:, None], teacher_inverse[:, None]
    values = direction_of(x, y, inverses[0], inverses[1], product[:, None], unit, negative_slope, P)
    values *= factor[:, None]
    tl.store(scaled + offsets, values.to(scaled.dtype.element_ty), mask=mask)
    tl.store(partials + tile.to(tl.int64) * CHANNELS + column, tl.sum(values, 0), mask=column < CHANNELS)
    if tl.program_id(0) == 0:
        tl.store(final, c * loss_factor(scale, weight, WEIGHTED, tl.float32))


def direction_scale(samples: int, size: int, p: int, reduction: str) -> float:
    """What multiplies ``upstream * weight * inverse_norm * direction``; the direction of p = 2 is sqrt(D) too long."""
    return reduction_scale(samples, size, p, reduction) * (1.0 if p == 1 else size**-0.5)


def scaled_direction(
    student_factor: Tensor,
    teacher_factor: Tensor,
    statistics: Tensor,
    upstream: Tensor,
    *,
    p: int,
    reduction: str,
    weight: float | Tensor,
    negative_slope: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient of the last convolution's result at one scale for the batch, in one launch: every backward's start.

    Args:
        student_factor: ``[N, H, W, K]`` contiguous, float32, bfloat16 or float16, none of its sizes 0, on a GPU (on the
            CPU in Triton's interpreter). Nothing is checked here.
        teacher_factor: the same shape, contiguous; also int8 or float8_e4m3fn.
        statistics: float32 ``[5, N]`` contiguous, as the forward of :func:`ftfast.ft_loss` on any backend of ours
            returned it for these factors.
        upstream: the gradient of the loss, 0-d, or ``[N]`` with any stride for "none".
        p, reduction, weight: as forward got them.
        negative_slope: of the LeakyReLU that made the student's factor.

    Returns:
        ``[N, H, W, K]`` in the student's dtype; its column sums ``[tiles, K]``, float32; and the 0-d float32 number
        that brings them, and all products with them, to the loss's own scale.
    """
    samples, height, width, channels = student_factor.shape
    pixels, size, device = samples * height * width, height * width * channels, student_factor.device
    scaled = torch.empty_like(student_factor)
    partials = torch.empty((ceil_div(pixels, SCALED_ROWS), channels), dtype=torch.float32, device=device)
    final = torch.empty((), dtype=torch.float32, device=device)
    factor, weight_tensor = split_weight(weight, device)
    columns = min(SCALED_COLUMNS, max(16, power_of_2(channels)))
    with device_guard(device):
        launch(
            _scaled_direction_kernel,
            partials.shape[0] * ceil_div(channels, columns),
            (
                student_factor,
                teacher_factor,
                statistics,
                upstream,
                final if weight_tensor is None else weight_tensor,
                scaled,
                partials,
                final,
            ),
            (
                pixels,
                height * width,
                samples,
                upstream.stride(0) if upstream.ndim else 0,
                direction_scale(samples, size, p, reduction) * factor,
                size**0.5,
                negative_slope,
            ),
            {
                "CHANNELS": channels,
                "P": p,
                "WEIGHTED": weight_tensor is not None,
                "ROWS": SCALED_ROWS,
                "COLUMNS": columns,
                "NORMS": NORMS_BLOCK,
                "num_warps": 4,
                "enable_fp_fusion": False,
            },
        )
    return scaled, partials, final
