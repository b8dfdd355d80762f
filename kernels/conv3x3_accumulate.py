"""The products of a 3x3 convolution and of its weight gradient over one tile, shared by every kernel that convolves.

A map ``[N, H, W, C]`` is a matrix of pixels ``[N * H * W, C]`` where the neighbour under a tap is ``dy * W + dx`` rows
further on; rows that a shift takes over the map's border count as zeros. So :func:`accumulate_taps` has tiles without
overhang at any map size. :func:`accumulate_pixels` multiplies two maps with each other: it reads them line by line,
where a descriptor's zeros are the border and no mask is needed.
"""

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
def _settled(accumulator, DESCRIPTORS: tl.constexpr):
    """The same numbers, of a product that has ended where it runs on its own: on compute capability 9.0.

    There the compiler lets products go on into the next step of a loop whose left operands, having been masked or
    turned round, are in registers, and the next step loads its own into the same registers: wrong results, seen with
    Triton 3.6. It waits for a product whose result is used, so this uses it, in no instruction.
    """
    if DESCRIPTORS == 90 and not INTERPRETED:
        return tl.inline_asm_elementwise("", "=r,0", [accumulator], dtype=tl.float32, is_pure=True, pack=1)
    else:
        return accumulator


@triton.jit
def accumulate_taps(
    x,
    weight,
    first_pixel,
    first_column,
    pixels,
    height,
    width,
    taps,
    CHANNELS: tl.constexpr,
    PADDED_CHANNELS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
    BC: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    """``out[p, k] = sum over taps and c of x[p + shift(tap), c] * weight[tap * PADDED_CHANNELS + c, k]``, one tile.

    Args:
        x: the map's pixels ``[pixels, CHANNELS]``: with DESCRIPTORS (the compute capability that
            they are for, else 0) a TensorDescriptor of block ``[BM, BC]``, otherwise a pointer.
        weight: packed ``[9 * PADDED_CHANNELS, COLUMNS]``: a TensorDescriptor of block ``[BC, BK]``, or a pointer.
        first_pixel, first_column: of the tile; its overhang past the last pixel or column comes out as zeros.
        pixels, height, width: N * H * W, H, W.
        taps: 9, as a run-time number.
        CHANNELS, PADDED_CHANNELS, COLUMNS: of the map, and what the packed weight was padded to; BC divides the second.

    Returns:
        The accumulator ``[BM, BK]``, float32.
    """
    BLOCKS: tl.constexpr = PADDED_CHANNELS // BC
    lane = tl.arange(0, BM)
    pixel = first_pixel + lane
    across = pixel % width
    down = (pixel // width) % height
    if not DESCRIPTORS:
        channel_lane = tl.arange(0, BC)
        column_lane = tl.arange(0, BK)
        x_offsets = lane[:, None] * CHANNELS + channel_lane[None, :]
        weight_offsets = channel_lane[:, None] * COLUMNS + column_lane[None, :]
        within = first_column + column_lane < COLUMNS
        weight += first_column
    accumulator = tl.zeros((BM, BK), tl.float32)
    for step in range(taps * BLOCKS):
        tap = step // BLOCKS
        channel = (step % BLOCKS) * BC
        dy = tap // 3 - 1
        dx = tap % 3 - 1
        row = first_pixel + dy * width + dx
        inside = (across + dx >= 0) & (across + dx < width) & (down + dy >= 0) & (down + dy < height)
        if DESCRIPTORS:
            # Rows before the first and after the last pixel are read as zeros, so are channels past the last.
            values = x.load([row, channel])
            values = tl.where(inside[:, None], values, 0.0)
            factors = weight.load([step * BC, first_column])
        else:
            start = x + (row.to(tl.int64) * CHANNELS + channel)
            mask = (inside & (pixel < pixels))[:, None]
            if CHANNELS % BC != 0:
                mask = mask & (channel + channel_lane < CHANNELS)[None, :]
            values = tl.load(start + x_offsets, mask=mask, other=0.0)
            if COLUMNS % BK == 0:
                factors = tl.load(weight + weight_offsets)
            else:
                factors = tl.load(weight + weight_offsets, mask=within[None, :], other=0.0)
            weight += BC * COLUMNS
        accumulator = _settled(multiply_accumulate(values, factors, accumulator, INPUT_PRECISION), DESCRIPTORS)
    return accumulator


@triton.jit
def accumulate_pixels(
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
    CHANNELS: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    BK: tl.constexpr,
    IMAGES: tl.constexpr,
    ACROSS: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    """``sum over pixels of x[p + shift(tap), c] * dz[p, k]`` for one tile of (c, k) and some of the pixels.

    A step takes one line of IMAGES images, ACROSS pixels of it; :func:`steps_over` counts them.

    Args:
        x, dz: maps ``[samples, height, width, CHANNELS]`` and ``[..., COLUMNS]``: with DESCRIPTORS 4-d descriptors of
            blocks ``[IMAGES, 1, ACROSS, ROWS]`` and ``[IMAGES, 1, ACROSS, BK]``, otherwise pointers of any alignment.
        tap: 3 * ky + kx.
        first_row, first_column: of the tile in c and k; its overhang past the last channels comes out as zeros.
        first_step, last_step: the steps to take, the last one excluded.

    Returns:
        The accumulator ``[ROWS, BK]``, float32.
    """
    dy = tap // 3 - 1
    dx = tap % 3 - 1
    blocks_across = tl.cdiv(width, ACROSS)
    if not DESCRIPTORS:
        lane = tl.arange(0, IMAGES * ACROSS)
        image = lane // ACROSS
        across = lane % ACROSS
        row = first_row + tl.arange(0, ROWS)
        column = first_column + tl.arange(0, BK)
        lane_offsets = image * height * width + across
        x_offsets = lane_offsets[:, None] * CHANNELS + row[None, :]
        dz_offsets = lane_offsets[:, None] * COLUMNS + column[None, :]
    accumulator = tl.zeros((ROWS, BK), tl.float32)
    for step in range(first_step, last_step):
        step += tl.zeros((), tl.int32)  # in the interpreter it is a number of Python's
        line = step // blocks_across
        left = (step % blocks_across) * ACROSS
        sample = (line // height) * IMAGES
        down = line % height
        if DESCRIPTORS:
            # Coordinates outside the map are read as zeros.
            values = x.load([sample, down + dy, left + dx, first_row]).reshape(IMAGES * ACROSS, ROWS)
            gradients = dz.load([sample, down, left, first_column]).reshape(IMAGES * ACROSS, BK)
        else:
            pixel = (sample.to(tl.int64) * height + down) * width + left
            present = (sample + image < samples) & (left + across < width)
            # A line above or below the map has no pixels.
            end = tl.where((down + dy >= 0) & (down + dy < height), width, 0)
            shifted = (left + across + dx >= 0) & (left + across + dx < end)
            mask = (present & shifted)[:, None]
            if CHANNELS % ROWS != 0:
                mask = mask & (row < CHANNELS)[None, :]
            values = tl.load(x + (pixel + dy * width + dx) * CHANNELS + x_offsets, mask=mask, other=0.0)
            mask = present[:, None]
            if COLUMNS % BK != 0:
                mask = mask & (column < COLUMNS)[None, :]
            gradients = tl.load(dz + pixel * COLUMNS + dz_offsets, mask=mask, other=0.0)
        accumulator = multiply_accumulate(tl.trans(values), gradients, accumulator, INPUT_PRECISION)
        accumulator = _settled(accumulator, DESCRIPTORS)
    return accumulator


def lines(width: int, pixels: int) -> tuple[int, int]:
    """How many images and how many pixels of a line make ``pixels``, a power of two, for :func:`accumulate_pixels`."""
    across = min(triton.next_power_of_2(width), pixels)
    return pixels // across, across


def steps_over(samples: int, height: int, width: int, images: int, across: int) -> int:
    """How many steps of :func:`accumulate_pixels` walk over a map."""
    return triton.cdiv(samples, images) * height * triton.cdiv(width, across)
