"""One image's map as a tile of a program: loaded, stored, convolved, for both directions of the single-pass head."""

# mypy: disallow-incomplete-defs=False
# (a kernel's parameters carry Triton's annotations, and only where Triton needs one)

import triton
import triton.language as tl

from .launch import INTERPRETED


@triton.jit
def multiply_accumulate(left, right, accumulator, INPUT_PRECISION: tl.constexpr):
    """``accumulator + left @ right`` in float32; INPUT_PRECISION matters to float32 operands alone."""
    if INTERPRETED:
        return tl.dot(left.to(tl.float32), right.to(tl.float32), accumulator)
    else:
        return tl.dot(left, right, accumulator, input_precision=INPUT_PRECISION)


@triton.jit
def convolve_image(
    x,
    weight,
    height,
    width,
    taps,
    CHANNELS: tl.constexpr,
    PADDED_CHANNELS: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    """``out[p, k]``, ``[ROWS, COLUMNS]`` float32, of one image x ``[H * W, CHANNELS]`` with a packed weight.

    ``taps`` is 9 as a run-time number: a constant one would be unrolled, and spill. Rows past ``H * W`` are zeros.
    """
    BLOCKS: tl.constexpr = PADDED_CHANNELS // BLOCK
    row = tl.arange(0, ROWS)
    down = row // width
    across = row % width
    channel_lane = tl.arange(0, BLOCK)
    column = tl.arange(0, COLUMNS)
    accumulator = tl.zeros((ROWS, COLUMNS), tl.float32)
    for step in range(taps * BLOCKS):
        tap = step // BLOCKS
        channel = (step % BLOCKS) * BLOCK + channel_lane
        y = down + tap // 3 - 1
        z = across + tap % 3 - 1
        inside = (row < height * width) & (y >= 0) & (y < height) & (z >= 0) & (z < width)
        mask = inside[:, None]
        if CHANNELS % BLOCK != 0:
            mask = mask & (channel < CHANNELS)[None, :]
        values = tl.load(x + (y * width + z)[:, None] * CHANNELS + channel[None, :], mask=mask, other=0.0)
        factors = tl.load(weight + (tap * PADDED_CHANNELS + channel)[:, None] * COLUMNS + column[None, :])
        accumulator = multiply_accumulate(values, factors, accumulator, INPUT_PRECISION)
    return accumulator


@triton.jit
def layer_of_image(
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


@triton.jit
def store_image(y, values, pixels, CHANNELS: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr):
    """Rounds ``values [ROWS, COLUMNS]`` and stores what lies inside of an image ``y [pixels, CHANNELS]``."""
    row = tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    mask = (row < pixels)[:, None] & (column < CHANNELS)[None, :]
    tl.store(y + row[:, None] * CHANNELS + column[None, :], values.to(y.dtype.element_ty), mask=mask)


@triton.jit
def load_image(
    x, pixels, CHANNELS: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr, CACHE: tl.constexpr
):  # fmt: skip
    """An image ``x [pixels, CHANNELS]`` as ``[ROWS, COLUMNS]`` float32, zeros outside; CACHE is the load's, or ""."""
    row = tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    mask = (row < pixels)[:, None] & (column < CHANNELS)[None, :]
    places = x + row[:, None] * CHANNELS + column[None, :]
    return tl.load(places, mask=mask, other=0.0, cache_modifier=CACHE).to(tl.float32)
