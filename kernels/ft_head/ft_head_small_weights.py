"""Triton kernel of the weight and bias gradients of a head in a single pass: the student's three layers, one launch.

    dW[k, c, tap] = final * sum over pixels of x[p + shift(tap), c] * dz[p, k],   db[k] = final * sum of dz[p, k]

A program owns a tile of one layer's weight under one tap over a share of the images; the program of a tile that arrives
last adds up the shares in a fixed order.
"""

# mypy: disallow-incomplete-defs=False
# (a kernel's parameters carry Triton's annotations, and only where Triton needs one)

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from ftfast.kernels.image_tiles import multiply_accumulate
from ftfast.kernels.launch import PlannedLaunch, ceil_div
from ftfast.kernels.layout import Layout, Place

from .ft_head_small_shape import HeadShape, rows_for, stages_for
from .pack_weights import TAPS, padded_channels

# The widest tile of a weight, shares of the images, and the programs of the bias gradients.
WIDEST_TILE = 64
SHARES = 5
BIAS_COLUMNS = 64
BIAS_ROWS = 32


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
    CHANNELS_LAST: tl.constexpr,
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
        places = output.to(tl.int64)[None, :] * (CHANNELS * 9)
        if CHANNELS_LAST:
            places += tap * CHANNELS + channel[:, None]
        else:
            places += channel[:, None] * 9 + tap
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
    gradient0,  # [Cs, Cs, 3, 3], contiguous or channels_last all three
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
    CHANNELS_LAST: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    tile = tl.program_id(0) // SHARES
    share = tl.program_id(0) % SHARES
    if tile < tiles0:
        _weight_tile(
            x, dz1, factors, shares0, counters, final, gradient0, tile, share, height, width, samples,
            STUDENT_CHANNELS, STUDENT_CHANNELS, STUDENT_TILE, STUDENT_TILE, ROWS, SHARES, False, CHANNELS_LAST,
            INPUT_PRECISION,
        )  # fmt: skip
    elif tile < tiles0 + tiles1:
        _weight_tile(
            a1, dz2, factors, shares1, counters + tiles0, final, gradient1, tile - tiles0, share, height, width,
            samples, STUDENT_CHANNELS, FACTOR_CHANNELS, STUDENT_TILE, FACTOR_TILE, ROWS, SHARES, False,
            CHANNELS_LAST, INPUT_PRECISION,
        )  # fmt: skip
    elif tile < tiles0 + tiles1 + tiles2:
        _weight_tile(
            a2, direction, factors, shares2, counters + tiles0 + tiles1, final, gradient2, tile - tiles0 - tiles1,
            share, height, width, samples, FACTOR_CHANNELS, FACTOR_CHANNELS, FACTOR_TILE, FACTOR_TILE, ROWS, SHARES,
            True, CHANNELS_LAST, INPUT_PRECISION,
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


class WeightGradients:
    """The gradients of the student's three layers, ``[K, C, 3, 3]`` and ``[K]``, in one launch.

    Args:
        scratch: gets places for the shares of the images.
        channels_last: whether the results are.

    Attributes:
        shares: these places.
        counters: how many programs of which the last one to arrive goes on.
    """

    def __init__(self, shape: HeadShape, scratch: Layout, *, channels_last: bool) -> None:
        self._shape, self._channels_last = shape, channels_last
        layers = ((shape.student, shape.student), (shape.student, shape.factor), (shape.factor, shape.factor))
        self._tile_of = {count: min(padded_channels(count), WIDEST_TILE) for count in (shape.student, shape.factor)}
        tile_of = self._tile_of
        self._tiles = [TAPS * ceil_div(a, tile_of[a]) * ceil_div(b, tile_of[b]) for a, b in layers]
        self.shares = [
            scratch.add((count, SHARES, tile_of[a], tile_of[b]), torch.float32)
            for count, (a, b) in zip(self._tiles, layers, strict=True)
        ]
        self.counters = sum(self._tiles)
        self.numbers = (shape.height, shape.width, shape.samples, *self._tiles)

    def launch(self, places: Sequence[Place]) -> PlannedLaunch:
        """Places of the kernel's pointers, in their order; its numbers are :attr:`numbers`."""
        shape, widths = self._shape, self._shape.student + 2 * self._shape.factor
        constants = {
            "STUDENT_CHANNELS": shape.student,
            "FACTOR_CHANNELS": shape.factor,
            "STUDENT_TILE": self._tile_of[shape.student],
            "FACTOR_TILE": self._tile_of[shape.factor],
            "ROWS": rows_for(shape.pixels),
            "SHARES": SHARES,
            "BIAS_COLUMNS": BIAS_COLUMNS,
            "BIAS_ROWS": BIAS_ROWS,
            "CHANNELS_LAST": self._channels_last,
            "INPUT_PRECISION": "tf32",
            "num_warps": 4,
            "num_stages": stages_for(shape.device, shape.student, shape.factor),
            "enable_fp_fusion": False,
        }
        programs = (self.counters + ceil_div(widths, BIAS_COLUMNS)) * SHARES
        return PlannedLaunch(_small_head_weight_gradients_kernel, programs, places, constants)
