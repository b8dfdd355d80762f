"""Triton kernels of a small head's backward in two launches: the input gradients, then all weight gradients.

    dz3 = f_n * direction,   dz2 = conv_transposed(dz3) * slope(a2),   dz1 = conv_transposed(dz2) * slope(a1),
    dx = conv_transposed(dz1) * final,   dW[k, c, tap] = final * sum over pixels of x[p + shift(tap), c] * dz[p, k]

with ``f_n = upstream_n * inverse_norm_n / c`` and ``final`` as in ft_head_loss.py. A program of the first launch owns
one image. One of the second owns a tile of one layer's weight under one tap over a share of the images; the program of
a tile that arrives last adds up the shares in a fixed order.
"""

# mypy: disallow-incomplete-defs=False
# (a kernel's parameters carry Triton's annotations, and only where Triton needs one)

import torch
import triton
import triton.language as tl
from torch import Tensor

from .device import arrival_counters, device_guard
from .ft_head_loss import direction_scale, largest_factor
from .ft_head_small import TAPS, Kept, rows_for, stages_for, warps_for
from .image_tiles import convolve_image, load_image, multiply_accumulate, store_image
from .launch import ceil_div, launch
from .loss_numbers import split_weight
from .loss_terms import loss_factor
from .pack_weights import padded_channels

# The second launch: the widest tile of a weight, shares of the images, and the programs of the bias gradients.
WIDEST_TILE = 64
SHARES = 5
BIAS_COLUMNS = 64
BIAS_ROWS = 32
NORMS_BLOCK = 512


@triton.jit
def _slope(y, pixels, negative_slope, CHANNELS: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr):
    return tl.where(load_image(y, pixels, CHANNELS, COLUMNS, ROWS) > 0, 1.0, negative_slope)


@triton.jit
def _store_sums(partials, values, CHANNELS: tl.constexpr, COLUMNS: tl.constexpr):
    column = tl.arange(0, COLUMNS)
    tl.store(partials + column, tl.sum(values, 0), mask=column < CHANNELS)


@triton.jit(do_not_specialize=["height", "width", "samples", "taps", "upstream_stride"])
def _small_head_input_gradients_kernel(
    direction,  # [N, H, W, K]
    inverse_norm,  # [N]
    upstream,  # 0-d (stride 0) or [N]
    weight,
    backward0,  # packed [9 * Kp, Cp] all three
    backward1,
    backward2,
    a1,  # [N, H, W, Cs]
    a2,  # [N, H, W, K]
    dz1,  # [N, H, W, Cs]
    dz2,  # [N, H, W, K]
    dx,  # [N, H, W, Cs]
    partials,  # [N, Cs + 2 K]: the bias gradients of one image, layer by layer
    factors,  # [N]: f_n
    final,
    height,
    width,
    samples: tl.int64,
    taps,
    upstream_stride: tl.int64,
    scale: tl.float64,
    negative_slope: tl.float32,
    STUDENT_CHANNELS: tl.constexpr,
    FACTOR_CHANNELS: tl.constexpr,
    STUDENT_PADDED: tl.constexpr,
    FACTOR_PADDED: tl.constexpr,
    STUDENT_BLOCK: tl.constexpr,
    FACTOR_BLOCK: tl.constexpr,
    NEEDS_INPUT: tl.constexpr,
    WEIGHTED: tl.constexpr,
    ROWS: tl.constexpr,
    NORMS: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64)
    pixels = height * width
    c = largest_factor(inverse_norm, upstream, samples, upstream_stride, NORMS)
    factor = tl.load(inverse_norm + n) * tl.load(upstream + n * upstream_stride).to(tl.float32) / c
    left = c * loss_factor(scale, weight, WEIGHTED, tl.float32)
    tl.store(factors + n, factor)
    if n == 0:
        tl.store(final, left)
    direction += n * pixels * FACTOR_CHANNELS
    a1 += n * pixels * STUDENT_CHANNELS
    a2 += n * pixels * FACTOR_CHANNELS
    dz1 += n * pixels * STUDENT_CHANNELS
    dz2 += n * pixels * FACTOR_CHANNELS
    partials += n * (STUDENT_CHANNELS + 2 * FACTOR_CHANNELS)
    d = load_image(direction, pixels, FACTOR_CHANNELS, FACTOR_PADDED, ROWS)
    _store_sums(partials + STUDENT_CHANNELS + FACTOR_CHANNELS, d * factor, FACTOR_CHANNELS, FACTOR_PADDED)
    # The factor of an image leaves its convolution, which is linear.
    gradient = convolve_image(
        direction, backward2, height, width, taps, FACTOR_CHANNELS, FACTOR_PADDED, FACTOR_PADDED, ROWS, FACTOR_BLOCK,
        INPUT_PRECISION,
    )  # fmt: skip
    gradient *= factor
    gradient *= _slope(a2, pixels, negative_slope, FACTOR_CHANNELS, FACTOR_PADDED, ROWS)
    gradient = tl.where((tl.arange(0, ROWS) < pixels)[:, None], gradient, 0.0)
    store_image(dz2, gradient, pixels, FACTOR_CHANNELS, FACTOR_PADDED, ROWS)
    _store_sums(partials + STUDENT_CHANNELS, gradient, FACTOR_CHANNELS, FACTOR_PADDED)
    tl.debug_barrier()
    gradient = convolve_image(
        dz2, backward1, height, width, taps, FACTOR_CHANNELS, FACTOR_PADDED, STUDENT_PADDED, ROWS, FACTOR_BLOCK,
        INPUT_PRECISION,
    )  # fmt: skip
    gradient *= _slope(a1, pixels, negative_slope, STUDENT_CHANNELS, STUDENT_PADDED, ROWS)
    gradient = tl.where((tl.arange(0, ROWS) < pixels)[:, None], gradient, 0.0)
    store_image(dz1, gradient, pixels, STUDENT_CHANNELS, STUDENT_PADDED, ROWS)
    _store_sums(partials, gradient, STUDENT_CHANNELS, STUDENT_PADDED)
    if NEEDS_INPUT:
        tl.debug_barrier()
        gradient = convolve_image(
            dz1, backward0, height, width, taps, STUDENT_CHANNELS, STUDENT_PADDED, STUDENT_PADDED, ROWS,
            STUDENT_BLOCK, INPUT_PRECISION,
        )  # fmt: skip
        dx += n * pixels * STUDENT_CHANNELS
        store_image(dx, gradient * left, pixels, STUDENT_CHANNELS, STUDENT_PADDED, ROWS)


@triton.jit
def _weight_tile(
    x,
    dz,
    factors,
    shares,
    counters,
    final,
    gradient,
    tile,
    share,
    height,
    width,
    samples,
    CHANNELS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    BC: tl.constexpr,
    BK: tl.constexpr,
    ROWS: tl.constexpr,
    SHARES: tl.constexpr,
    HAS_FACTORS: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    """One share of one tile ``[BC, BK]`` of a layer's ``gradient [K, C, 3, 3]``; tiles count taps first."""
    ACROSS: tl.constexpr = (OUTPUTS + BK - 1) // BK
    DOWN: tl.constexpr = (CHANNELS + BC - 1) // BC
    tap = tile // (ACROSS * DOWN)
    channel = ((tile // ACROSS) % DOWN) * BC + tl.arange(0, BC)
    output = (tile % ACROSS) * BK + tl.arange(0, BK)
    row = tl.arange(0, ROWS)
    y = row // width + tap // 3 - 1
    z = row % width + tap % 3 - 1
    map_size = (height * width).to(tl.int64)
    present = row < map_size
    inside = present & (y >= 0) & (y < height) & (z >= 0) & (z < width)
    x_mask = inside[:, None] & (channel < CHANNELS)[None, :]
    dz_mask = present[:, None] & (output < OUTPUTS)[None, :]
    x_offsets = (y * width + z)[:, None] * CHANNELS + channel[None, :]
    dz_offsets = row[:, None] * OUTPUTS + output[None, :]
    accumulator = tl.zeros((BC, BK), tl.float32)
    for image in range(share, samples, SHARES):
        start = map_size * image
        values = tl.load(x + start * CHANNELS + x_offsets, mask=x_mask, other=0.0)
        others = tl.load(dz + start * OUTPUTS + dz_offsets, mask=dz_mask, other=0.0)
        if HAS_FACTORS:
            others = (others.to(tl.float32) * tl.load(factors + image)).to(x.dtype.element_ty)
        accumulator = multiply_accumulate(tl.trans(values), others, accumulator, INPUT_PRECISION)
    offsets = tl.arange(0, BC)[:, None] * BK + tl.arange(0, BK)[None, :]
    shares += tile.to(tl.int64) * (SHARES * BC * BK)
    tl.store(shares + share * (BC * BK) + offsets, accumulator)
    # The barrier puts this program's store before the count that releases it; L1 may hold stale lines, so .cg.
    tl.debug_barrier()
    if tl.atomic_add(counters + tile, 1, sem="acq_rel") == SHARES - 1:
        total = tl.zeros((BC, BK), tl.float32)
        for other in range(SHARES):
            total += tl.load(shares + other * (BC * BK) + offsets, cache_modifier=".cg")
        total *= tl.load(final)
        mask = (channel < CHANNELS)[:, None] & (output < OUTPUTS)[None, :]
        places = output.to(tl.int64)[None, :] * (CHANNELS * 9) + channel[:, None] * 9 + tap
        tl.store(gradient + places, total, mask=mask)
        tl.store(counters + tile, 0)


@triton.jit(do_not_specialize=["height", "width", "samples", "tiles0", "tiles1", "tiles2"])
def _small_head_weight_gradients_kernel(
    x,  # [N, H, W, Cs]
    a1,  # [N, H, W, Cs]
    a2,  # [N, H, W, K]
    dz1,  # [N, H, W, Cs]
    dz2,  # [N, H, W, K]
    direction,  # [N, H, W, K]
    factors,  # [N]
    partials,  # [N, Cs + 2 K]
    final,
    shares0,  # [tiles, SHARES, BC, BK] of the layer, three of them
    shares1,
    shares2,
    counters,
    gradient0,  # [Cs, Cs, 3, 3]
    gradient1,  # [K, Cs, 3, 3]
    gradient2,  # [K, K, 3, 3]
    biases,  # [Cs + 2 K]
    height,
    width,
    samples,
    tiles0,
    tiles1,
    tiles2,
    STUDENT_CHANNELS: tl.constexpr,
    FACTOR_CHANNELS: tl.constexpr,
    STUDENT_TILE: tl.constexpr,
    FACTOR_TILE: tl.constexpr,
    ROWS: tl.constexpr,
    SHARES: tl.constexpr,
    BIAS_COLUMNS: tl.constexpr,
    BIAS_ROWS: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    tile = tl.program_id(0) // SHARES
    share = tl.program_id(0) % SHARES
    if tile < tiles0:
        _weight_tile(
            x, dz1, factors, shares0, counters, final, gradient0, tile, share, height, width, samples,
            STUDENT_CHANNELS, STUDENT_CHANNELS, STUDENT_TILE, STUDENT_TILE, ROWS, SHARES, False, INPUT_PRECISION,
        )  # fmt: skip
    elif tile < tiles0 + tiles1:
        _weight_tile(
            a1, dz2, factors, shares1, counters + tiles0, final, gradient1, tile - tiles0, share, height, width,
            samples, STUDENT_CHANNELS, FACTOR_CHANNELS, STUDENT_TILE, FACTOR_TILE, ROWS, SHARES, False,
            INPUT_PRECISION,
        )  # fmt: skip
    elif tile < tiles0 + tiles1 + tiles2:
        _weight_tile(
            a2, direction, factors, shares2, counters + tiles0 + tiles1, final, gradient2, tile - tiles0 - tiles1,
            share, height, width, samples, FACTOR_CHANNELS, FACTOR_CHANNELS, FACTOR_TILE, FACTOR_TILE, ROWS, SHARES,
            True, INPUT_PRECISION,
        )  # fmt: skip
    elif share == 0:
        CHANNELS: tl.constexpr = STUDENT_CHANNELS + 2 * FACTOR_CHANNELS
        column = (tile - tiles0 - tiles1 - tiles2) * BIAS_COLUMNS + tl.arange(0, BIAS_COLUMNS)
        total = tl.zeros((BIAS_ROWS, BIAS_COLUMNS), tl.float32)
        for start in range(0, samples, BIAS_ROWS):
            image = start + tl.arange(0, BIAS_ROWS)
            mask = (image < samples)[:, None] & (column < CHANNELS)[None, :]
            places = partials + image.to(tl.int64)[:, None] * CHANNELS + column[None, :]
            total += tl.load(places, mask=mask, other=0.0)
        tl.store(biases + column, tl.sum(total, 0) * tl.load(final), mask=column < CHANNELS)


def small_head_backward(
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
) -> tuple[Tensor | None, list[Tensor], list[Tensor]]:
    """The gradients of :func:`~ftfast.kernels.ft_head_small.small_head_forward`, in two launches.

    Args:
        student: as forward got it.
        kept: as forward returned it; nothing of it is written to.
        student_weights_backward: three, packed backward in the student's dtype.
        upstream: the gradient of the loss, 0-d, or ``[N]`` with any stride for "none".
        p, reduction, weight: as forward got them.
        negative_slope: the student's.
        need_student_gradient: whether the gradient of the features is wanted.

    Returns:
        ``[N, H, W, Cs]`` in the student's dtype, or None; three weights' gradients ``[K, C, 3, 3]`` and three biases',
        float32.
    """
    samples, height, width, student_channels = student.shape
    factor_channels = kept.a2.shape[3]
    device = student.device
    widths = (student_channels, factor_channels, factor_channels)
    dz1, dz2 = torch.empty_like(student), torch.empty_like(kept.a2)
    dx = torch.empty_like(student) if need_student_gradient else None
    partials = torch.empty((samples, sum(widths)), dtype=torch.float32, device=device)
    factors = torch.empty(samples, dtype=torch.float32, device=device)
    final = torch.empty((), dtype=torch.float32, device=device)
    padded_student, padded_factor = padded_channels(student_channels), padded_channels(factor_channels)
    factor, weight_tensor = split_weight(weight, device)
    rows = rows_for(height * width)
    shared = {"STUDENT_CHANNELS": student_channels, "FACTOR_CHANNELS": factor_channels, "ROWS": rows}
    with device_guard(device):
        launch(
            _small_head_input_gradients_kernel,
            samples,
            (
                kept.direction,
                kept.inverse_norm,
                upstream,
                final if weight_tensor is None else weight_tensor,
                *student_weights_backward,
                kept.a1,
                kept.a2,
                dz1,
                dz2,
                dz1 if dx is None else dx,
                partials,
                factors,
                final,
            ),
            (
                height,
                width,
                samples,
                TAPS,
                upstream.stride(0) if upstream.ndim else 0,
                direction_scale(samples, height * width * factor_channels, p, reduction) * factor,
                negative_slope,
            ),
            {
                **shared,
                "STUDENT_PADDED": padded_student,
                "FACTOR_PADDED": padded_factor,
                "STUDENT_BLOCK": min(padded_student, 64),
                "FACTOR_BLOCK": min(padded_factor, 64),
                "NEEDS_INPUT": need_student_gradient,
                "WEIGHTED": weight_tensor is not None,
                "NORMS": NORMS_BLOCK,
                "INPUT_PRECISION": "tf32",
                "num_warps": warps_for(student_channels, factor_channels),
                "num_stages": stages_for(device, student_channels, factor_channels),
                "enable_fp_fusion": False,
            },
        )
    tile_of = {count: min(padded_channels(count), WIDEST_TILE) for count in widths}
    layers = ((student_channels, student_channels), (student_channels, factor_channels), (factor_channels,) * 2)
    tiles = [TAPS * ceil_div(a, tile_of[a]) * ceil_div(b, tile_of[b]) for a, b in layers]
    shares = [
        torch.empty((count, SHARES, tile_of[a], tile_of[b]), dtype=torch.float32, device=device)
        for count, (a, b) in zip(tiles, layers, strict=True)
    ]
    gradients = [torch.empty((b, a, 3, 3), dtype=torch.float32, device=device) for a, b in layers]
    biases = torch.empty(sum(widths), dtype=torch.float32, device=device)
    programs = (sum(tiles) + ceil_div(sum(widths), BIAS_COLUMNS)) * SHARES
    with device_guard(device):
        launch(
            _small_head_weight_gradients_kernel,
            programs,
            (
                student,
                kept.a1,
                kept.a2,
                dz1,
                dz2,
                kept.direction,
                factors,
                partials,
                final,
                *shares,
                arrival_counters(device, sum(tiles)),
                *gradients,
                biases,
            ),
            (height, width, samples, *tiles),
            {
                **shared,
                "STUDENT_TILE": tile_of[student_channels],
                "FACTOR_TILE": tile_of[factor_channels],
                "SHARES": SHARES,
                "BIAS_COLUMNS": BIAS_COLUMNS,
                "BIAS_ROWS": BIAS_ROWS,
                "INPUT_PRECISION": "tf32",
                "num_warps": 4,
                "num_stages": stages_for(device, student_channels, factor_channels),
                "enable_fp_fusion": False,
            },
        )
    return dx, gradients, list(biases.split(list(widths)))
