"""Triton kernels of the loss at the end of a head, whose gradient goes on into the last convolution.

Per sample, with a = s / max(|s|, eps) and b = t / max(|t|, eps) as in the loss alone, the gradient of the last
convolution's result before its LeakyReLU is

    dz = u * weight * scale / max(|s|, eps) * direction,    direction = (g - a <g, a>) * slope(s)

with g = sign(a - b) for p = 1, (a - b) / l for p = 2, u the upstream gradient and scale that of the reduction. Forward
writes the direction, which is of size O(1) (for p = 2 times sqrt(D)), and 1 / max(|s|, eps) beside it: in 16 bits dz
itself would underflow, and over samples of tiny norms overflow. Backward brings the samples to one scale, at which all
its products are computed; what is left of it multiplies the results once, in float32.

Kim, Park, Kwak, "Paraphrasing Complex Network: Network Compression via Factor Transfer", NeurIPS 2018, section 3.2.
"""

# mypy: disallow-incomplete-defs=False
# (a kernel's parameters carry Triton's annotations, and only where Triton needs one)

import torch
import triton
import triton.language as tl
from torch import Tensor

from .device import arrival_counters, device_guard
from .launch import ceil_div, launch, power_of_2
from .loss_numbers import norm_floor, reduction_scale, split_weight
from .loss_terms import loss_factor, reciprocal_distance, reciprocal_norm, square_root, terms_of
from .sample_layout import load, remaining, store, walk_over

# The largest samples that stay in registers, and the block of those that are walked over three times.
REGISTER_SIZE = 8192
WALK_BLOCK = 4096
WALK_WARPS = 16
SMALLEST_BLOCK = 128
FOLD_BLOCK = 512
# A program of scaled_direction: so many pixels of so many channels.
SCALED_ROWS = 64
SCALED_COLUMNS = 64
NORMS_BLOCK = 512

_NUMBERS = ["student_row", "teacher_row", "direction_row", "size", "samples"]
_POINTERS = ["student", "teacher", "loss", "direction", "inverse_norm", "distances", "counter", "weight"]


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


@triton.jit(do_not_specialize=_NUMBERS, do_not_specialize_on_alignment=_POINTERS)
def _head_loss_kernel(
    student,  # [N, D]
    teacher,  # [N, D]
    loss,
    direction,  # [N, D]
    inverse_norm,  # [N]
    distances,  # [N]: l
    counter,
    weight,
    student_row: tl.int64,
    teacher_row: tl.int64,
    direction_row: tl.int64,
    size: tl.int64,
    samples: tl.int64,
    eps: tl.float64,
    scale: tl.float64,
    negative_slope: tl.float32,
    root_of_size: tl.float32,
    P: tl.constexpr,
    PER_SAMPLE: tl.constexpr,
    WEIGHTED: tl.constexpr,
    ALIGN: tl.constexpr,
    SINGLE_PASS: tl.constexpr,
    BLOCK: tl.constexpr,
    FOLD: tl.constexpr,
):
    """Loss, direction and inverse norm of one sample; the program that arrives last adds up the samples in order."""
    n = tl.program_id(0).to(tl.int64)
    student_base = student + n * (student_row * ALIGN)
    teacher_base = teacher + n * (teacher_row * ALIGN)
    direction_base = direction + n * (direction_row * ALIGN)
    lanes = tl.arange(0, BLOCK)
    zero = n * 0
    if SINGLE_PASS:
        mask = lanes < remaining(size, zero, BLOCK, ALIGN)
        x = load(student_base, zero, lanes, mask, 0, 1, 0, ALIGN, tl.float32)
        y = load(teacher_base, zero, lanes, mask, 0, 2, 0, ALIGN, tl.float32)
        student_squares = tl.sum(x * x, 0)
        teacher_squares = tl.sum(y * y, 0)
    else:
        # One loop for a sum: those of the loss, which fold their blocks into double, spill here. A head's maps are
        # short enough for the lanes' own sums.
        student_lanes = tl.zeros((BLOCK,), tl.float32)
        teacher_lanes = tl.zeros((BLOCK,), tl.float32)
        for start in range(zero, size * ALIGN, BLOCK):
            mask = lanes < remaining(size, start, BLOCK, ALIGN)
            x = load(student_base, start, lanes, mask, 0, 1, 0, ALIGN, tl.float32)
            y = load(teacher_base, start, lanes, mask, 0, 2, 0, ALIGN, tl.float32)
            student_lanes += x * x
            teacher_lanes += y * y
        student_squares = tl.sum(student_lanes, 0)
        teacher_squares = tl.sum(teacher_lanes, 0)
    floor = tl.full((), eps, tl.float32)
    student_inverse, student_clamped = reciprocal_norm(student_squares, floor)
    teacher_inverse, _ = reciprocal_norm(teacher_squares, floor)
    if SINGLE_PASS:
        distance_terms, product_terms, _ = terms_of(x * student_inverse, y * teacher_inverse, P)
        distance = tl.sum(distance_terms, 0)
        product = tl.sum(product_terms, 0)
    else:
        distance_lanes = tl.zeros((BLOCK,), tl.float32)
        product_lanes = tl.zeros((BLOCK,), tl.float32)
        for start in range(zero, size * ALIGN, BLOCK):
            mask = lanes < remaining(size, start, BLOCK, ALIGN)
            x = load(student_base, start, lanes, mask, 0, 1, 0, ALIGN, tl.float32)
            y = load(teacher_base, start, lanes, mask, 0, 2, 0, ALIGN, tl.float32)
            terms = terms_of(x * student_inverse, y * teacher_inverse, P)
            distance_lanes += terms[0]
            product_lanes += terms[1]
        distance = tl.sum(distance_lanes, 0)
        product = tl.sum(product_lanes, 0)
    unit = 1.0
    if P == 2:
        distance = square_root(distance)
        unit = reciprocal_distance(distance, root_of_size)
        product *= unit
    product = tl.where(student_clamped, 0.0, product)
    if SINGLE_PASS:
        values = direction_of(x, y, student_inverse, teacher_inverse, product, unit, negative_slope, P)
        store(direction_base, values, zero, lanes, mask, 0, 3, 0, ALIGN)
    else:
        for start in range(zero, size * ALIGN, BLOCK):
            mask = lanes < remaining(size, start, BLOCK, ALIGN)
            x = load(student_base, start, lanes, mask, 0, 1, 0, ALIGN, tl.float32)
            y = load(teacher_base, start, lanes, mask, 0, 2, 0, ALIGN, tl.float32)
            values = direction_of(x, y, student_inverse, teacher_inverse, product, unit, negative_slope, P)
            store(direction_base, values, start, lanes, mask, 0, 3, 0, ALIGN)
    tl.store(inverse_norm + n, student_inverse)
    finish_loss(loss, distances, counter, weight, distance, n, samples, scale, PER_SAMPLE, WEIGHTED, FOLD)


@triton.jit
def finish_loss(
    loss,
    distances,
    counter,
    weight,
    distance,
    n,
    samples,
    scale,
    PER_SAMPLE: tl.constexpr,
    WEIGHTED: tl.constexpr,
    FOLD: tl.constexpr,
):
    """Stores l of sample n; the program that arrives last adds up all ``distances [N]`` in order, into the loss."""
    if PER_SAMPLE:
        tl.store(loss + n, distance * loss_factor(scale, weight, WEIGHTED, tl.float32))
    else:
        tl.store(distances + n, distance)
        # The barrier puts this program's store before the count that releases it; L1 may hold stale lines, so .cg.
        tl.debug_barrier()
        if tl.atomic_add(counter, 1, sem="acq_rel") == tl.num_programs(0) - 1:
            total = tl.zeros((FOLD,), tl.float32)
            for start in range(samples * 0, samples, FOLD):
                row = start + tl.arange(0, FOLD)
                total += tl.load(distances + row, mask=row < samples, other=0.0, cache_modifier=".cg")
            tl.store(loss, tl.sum(total, 0) * loss_factor(scale, weight, WEIGHTED, tl.float32))
            tl.store(counter, 0)


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
    direction,  # [N * H * W, K]
    inverse_norm,  # [N]
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
    CHANNELS: tl.constexpr,
    WEIGHTED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    NORMS: tl.constexpr,
):
    """``scaled = direction * upstream * inverse_norm / c`` and its column sums; ``final = c * scale * weight``."""
    COLUMN_TILES: tl.constexpr = (CHANNELS + COLUMNS - 1) // COLUMNS
    tile = tl.program_id(0) // COLUMN_TILES
    column = (tl.program_id(0) % COLUMN_TILES) * COLUMNS + tl.arange(0, COLUMNS)
    c = largest_factor(inverse_norm, upstream, samples, upstream_stride, NORMS)
    row = tile * ROWS + tl.arange(0, ROWS)
    n = row // map_size
    given = row < pixels
    factor = tl.load(inverse_norm + n, mask=given, other=0.0)
    factor *= tl.load(upstream + n * upstream_stride, mask=given, other=0.0).to(tl.float32)
    mask = given[:, None] & (column < CHANNELS)[None, :]
    offsets = row.to(tl.int64)[:, None] * CHANNELS + column[None, :]
    values = tl.load(direction + offsets, mask=mask, other=0.0).to(tl.float32) * (factor / c)[:, None]
    tl.store(scaled + offsets, values.to(scaled.dtype.element_ty), mask=mask)
    tl.store(partials + tile.to(tl.int64) * CHANNELS + column, tl.sum(values, 0), mask=column < CHANNELS)
    if tl.program_id(0) == 0:
        tl.store(final, c * loss_factor(scale, weight, WEIGHTED, tl.float32))


def direction_scale(samples: int, size: int, p: int, reduction: str) -> float:
    """What multiplies ``upstream * weight * inverse_norm * direction``; the direction of p = 2 is sqrt(D) too long."""
    return reduction_scale(samples, size, p, reduction) * (1.0 if p == 1 else size**-0.5)


def head_loss(
    student_factor: Tensor,
    teacher_factor: Tensor,
    *,
    p: int,
    reduction: str,
    eps: float,
    weight: float | Tensor,
    negative_slope: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss, and what its backward needs besides the convolutions' own, in one launch.

    Args:
        student_factor: ``[N, H, W, K]`` contiguous, float32, bfloat16 or float16, none of its sizes 0, on a GPU (on the
            CPU in Triton's interpreter). Nothing is checked here.
        teacher_factor: the same shape, contiguous; also int8 or float8_e4m3fn.
        p, reduction, eps, weight: as :func:`ftfast.ft_loss`.
        negative_slope: of the LeakyReLU that made the student's factor.

    Returns:
        The loss, float32, 0-d or ``[N]``; the direction ``[N, H, W, K]`` in the student's dtype; ``[N]`` float32, the
        reciprocal norms.
    """
    samples, device = student_factor.shape[0], student_factor.device
    per_sample = reduction == "none"
    loss = torch.empty((samples,) if per_sample else (), dtype=torch.float32, device=device)
    direction = torch.empty_like(student_factor)
    norms_and_distances = torch.empty((2, samples), dtype=torch.float32, device=device)
    inverse_norm, distances = norms_and_distances[0], norms_and_distances[1]
    flat = (student_factor.view(samples, -1), teacher_factor.view(samples, -1), direction.view(samples, -1))
    walk, _ = walk_over(*flat)
    single_pass = walk.size <= REGISTER_SIZE
    block = max(SMALLEST_BLOCK, power_of_2(walk.size)) if single_pass else WALK_BLOCK
    factor, weight_tensor = split_weight(weight, device)
    with device_guard(device):
        launch(
            _head_loss_kernel,
            samples,
            (
                flat[0],
                flat[1],
                loss,
                flat[2],
                inverse_norm,
                distances,
                distances if per_sample else arrival_counters(device),
                distances if weight_tensor is None else weight_tensor,
            ),
            (
                *walk.rows,
                walk.units,
                samples,
                norm_floor(eps, torch.float32),
                reduction_scale(samples, walk.size, p, reduction) * factor,
                negative_slope,
                walk.size**0.5,
            ),
            {
                "P": p,
                "PER_SAMPLE": per_sample,
                "WEIGHTED": weight_tensor is not None,
                "ALIGN": walk.align,
                "SINGLE_PASS": single_pass,
                "BLOCK": block,
                "FOLD": FOLD_BLOCK,
                "num_warps": min(max(block // 512, 1), 16) if single_pass else WALK_WARPS,
                "enable_fp_fusion": False,
            },
        )
    return loss, direction, inverse_norm


def scaled_direction(
    direction: Tensor,
    inverse_norm: Tensor,
    upstream: Tensor,
    *,
    p: int,
    reduction: str,
    weight: float | Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient of the last convolution's result at one scale for the batch: where every backward starts.

    Args:
        direction, inverse_norm: as :func:`head_loss` returned them.
        upstream: the gradient of the loss, 0-d, or ``[N]`` with any stride for "none".
        p, reduction, weight: as forward got them.

    Returns:
        ``[N, H, W, K]`` in the direction's dtype; its column sums ``[tiles, K]``, float32; and the 0-d float32 number
        that brings them, and all products with them, to the loss's own scale.
    """
    samples, height, width, channels = direction.shape
    pixels, device = samples * height * width, direction.device
    scaled = torch.empty_like(direction)
    partials = torch.empty((ceil_div(pixels, SCALED_ROWS), channels), dtype=torch.float32, device=device)
    final = torch.empty((), dtype=torch.float32, device=device)
    factor, weight_tensor = split_weight(weight, device)
    columns = min(SCALED_COLUMNS, max(16, power_of_2(channels)))
    with device_guard(device):
        launch(
            _scaled_direction_kernel,
            partials.shape[0] * ceil_div(channels, columns),
            (
                direction,
                inverse_norm,
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
                direction_scale(samples, height * width * channels, p, reduction) * factor,
            ),
            {
                "CHANNELS": channels,
                "WEIGHTED": weight_tensor is not None,
                "ROWS": SCALED_ROWS,
                "COLUMNS": columns,
                "NORMS": NORMS_BLOCK,
                "num_warps": 4,
                "enable_fp_fusion": False,
            },
        )
    return scaled, partials, final
