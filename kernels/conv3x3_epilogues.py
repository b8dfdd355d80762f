"""How a tile of a 3x3 convolution ends: bias and LeakyReLU, or LeakyReLU's derivative and the bias gradient's sums."""

# mypy: disallow-incomplete-defs=False
# (a kernel's parameters carry Triton's annotations, and only where Triton needs one)

import triton
import triton.language as tl


@triton.jit
def store_tile(
    destination,
    tile,
    first_pixel,
    first_column,
    pixels,
    CHANNELS: tl.constexpr,
    BM: tl.constexpr,
    WIDTH: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):
    """Rounds ``tile [BM, WIDTH]`` to the dtype of ``destination [pixels, CHANNELS]`` and stores what lies inside."""
    if DESCRIPTORS:
        destination.store([first_pixel, first_column], tile.to(destination.dtype))
    else:
        pixel = first_pixel + tl.arange(0, BM)
        column = first_column + tl.arange(0, WIDTH)
        start = destination + first_pixel.to(tl.int64) * CHANNELS
        offsets = tl.arange(0, BM)[:, None] * CHANNELS + column[None, :]
        mask = (pixel < pixels)[:, None] & (column < CHANNELS)[None, :]
        tl.store(start + offsets, tile.to(destination.dtype.element_ty), mask=mask)


@triton.jit
def store_activated_tile(
    y,
    accumulator,
    bias,
    negative_slope,
    first_pixel,
    first_column,
    pixels,
    CHANNELS: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):
    """``y = leaky_relu(accumulator + bias)``: a forward tile's end; y ``[pixels, CHANNELS]``, bias ``[CHANNELS]``."""
    if HAS_BIAS:
        column = first_column + tl.arange(0, BK)
        accumulator += tl.load(bias + column, mask=column < CHANNELS, other=0.0)[None, :]
    activated = tl.where(accumulator > 0, accumulator, accumulator * negative_slope)
    store_tile(y, activated, first_pixel, first_column, pixels, CHANNELS, BM, BK, DESCRIPTORS)


@triton.jit
def _store_gradient_half(
    dx,
    output,
    partials,
    gradient,
    factor,
    negative_slope,
    first_pixel,
    first_column,
    pixels,
    CHANNELS: tl.constexpr,
    BM: tl.constexpr,
    HALF: tl.constexpr,
    HAS_OUTPUT: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):
    gradient *= factor
    if HAS_OUTPUT:
        column = first_column + tl.arange(0, HALF)
        if DESCRIPTORS:
            values = output.load([first_pixel, first_column])
        else:
            start = output + first_pixel.to(tl.int64) * CHANNELS
            lane = tl.arange(0, BM)
            mask = (first_pixel + lane < pixels)[:, None] & (column < CHANNELS)[None, :]
            values = tl.load(start + lane[:, None] * CHANNELS + column[None, :], mask=mask, other=0.0)
        gradient *= tl.where(values.to(tl.float32) > 0, 1.0, negative_slope)
        # Rows past the last pixel are zeros: taps stay in their image, and there is none.
        start = partials + (first_pixel // BM).to(tl.int64) * CHANNELS
        tl.store(start + column, tl.sum(gradient, 0), mask=column < CHANNELS)
    store_tile(dx, gradient, first_pixel, first_column, pixels, CHANNELS, BM, HALF, DESCRIPTORS)


@triton.jit
def store_gradient_tile(
    dx,
    output,
    partials,
    accumulator,
    factor,
    negative_slope,
    first_pixel,
    first_column,
    pixels,
    CHANNELS: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
    HAS_OUTPUT: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):
    """``dx = accumulator * factor * slope(output)`` and its column sums: an input gradient tile's end.

    With HAS_OUTPUT the slope is read from ``output [pixels, CHANNELS]``, and row ``first_pixel / BM`` of ``partials``
    takes the sums, unrounded; otherwise neither is touched. With DESCRIPTORS the blocks of dx and output are
    ``[BM, BK // 2]``: in two column halves nothing spills.
    """
    HALF: tl.constexpr = BK // 2
    left, right = accumulator.reshape(BM, 2, HALF).permute(0, 2, 1).split()
    for half in tl.static_range(2):
        _store_gradient_half(
            dx,
            output,
            partials,
            left if half == 0 else right,
            factor,
            negative_slope,
            first_pixel,
            first_column + half * HALF,
            pixels,
            CHANNELS,
            BM,
            HALF,
            HAS_OUTPUT,
            DESCRIPTORS,
        )
