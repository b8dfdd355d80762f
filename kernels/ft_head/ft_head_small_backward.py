"""Triton kernel of the input gradients of a head in a single pass: three convolutions back through the student.

    dz3 = f_n * direction,   dz2 = conv_transposed(dz3) * slope(a2),   dz1 = conv_transposed(dz2) * slope(a1),
    dx = conv_transposed(dz1) * final

with ``f_n = upstream_n * inverse_norm_n / c`` and ``final`` as in ft_head_loss.py. One program owns one image; the
weights' gradients, in ft_head_small_weights.py, take what it leaves.
"""

# mypy: disallow-incomplete-defs=False
# (a kernel's parameters carry Triton's annotations, and only where Triton needs one)

from collections.abc import Sequence

import triton
import triton.language as tl

from ftfast.kernels.image_tiles import convolve_image, load_image, store_image
from ftfast.kernels.launch import PlannedLaunch
from ftfast.kernels.layout import Place
from ftfast.kernels.loss_terms import loss_factor

from .ft_head_loss import largest_factor
from .ft_head_small import WIDEST_BLOCK
from .ft_head_small_shape import HeadShape, rows_for, stages_for, warps_for
from .pack_weights import padded_channels

NORMS_BLOCK = 512


@triton.jit
def _store_sums(partials, values, CHANNELS: tl.constexpr, COLUMNS: tl.constexpr):
    column = tl.arange(0, COLUMNS)
    tl.store(partials + column, tl.sum(values, 0), mask=column < CHANNELS)


@triton.jit
def _through_layer(
    dz, weight, y, into, partials, factor, height, width, taps, negative_slope,
    OUTPUTS: tl.constexpr, PADDED_OUTPUTS: tl.constexpr, BLOCK: tl.constexpr, CHANNELS: tl.constexpr,
    PADDED: tl.constexpr, ROWS: tl.constexpr, INPUT_PRECISION: tl.constexpr,
):  # fmt: skip
    """``into = factor * conv_transposed(dz) * slope(y)`` of one image, and its column sums; y is the layer's input."""
    pixels = height * width
    gradient = convolve_image(
        dz, weight, height, width, taps, OUTPUTS, PADDED_OUTPUTS, PADDED, ROWS, BLOCK, INPUT_PRECISION
    )
    gradient *= factor
    gradient *= tl.where(load_image(y, pixels, CHANNELS, PADDED, ROWS, "") > 0, 1.0, negative_slope)
    gradient = tl.where((tl.arange(0, ROWS) < pixels)[:, None], gradient, 0.0)
    store_image(into, gradient, pixels, CHANNELS, PADDED, ROWS)
    _store_sums(partials, gradient, CHANNELS, PADDED)
    tl.debug_barrier()


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
    d = load_image(direction, pixels, FACTOR_CHANNELS, FACTOR_PADDED, ROWS, "")
    _store_sums(partials + STUDENT_CHANNELS + FACTOR_CHANNELS, d * factor, FACTOR_CHANNELS, FACTOR_PADDED)
    # The factor of an image leaves its convolution, which is linear.
    _through_layer(
        direction, backward2, a2, dz2, partials + STUDENT_CHANNELS, factor, height, width, taps, negative_slope,
        FACTOR_CHANNELS, FACTOR_PADDED, FACTOR_BLOCK, FACTOR_CHANNELS, FACTOR_PADDED, ROWS, INPUT_PRECISION,
    )  # fmt: skip
    _through_layer(
        dz2, backward1, a1, dz1, partials, 1.0, height, width, taps, negative_slope,
        FACTOR_CHANNELS, FACTOR_PADDED, FACTOR_BLOCK, STUDENT_CHANNELS, STUDENT_PADDED, ROWS, INPUT_PRECISION,
    )  # fmt: skip
    if NEEDS_INPUT:
        gradient = convolve_image(
            dz1, backward0, height, width, taps, STUDENT_CHANNELS, STUDENT_PADDED, STUDENT_PADDED, ROWS,
            STUDENT_BLOCK, INPUT_PRECISION,
        )  # fmt: skip
        dx += n * pixels * STUDENT_CHANNELS
        store_image(dx, gradient * left, pixels, STUDENT_CHANNELS, STUDENT_PADDED, ROWS)


def input_gradients_launch(
    shape: HeadShape, places: Sequence[Place], *, needs_input: bool, weighted: bool
) -> PlannedLaunch:
    """The gradients of all maps of a head in a single pass, in one launch.

    Args:
        places: of the kernel's pointers, in their order.
        needs_input: whether the gradient of the features is wanted.
        weighted: whether the weight is a tensor.
    """
    padded = [padded_channels(count) for count in (shape.student, shape.factor)]
    constants = {
        "STUDENT_CHANNELS": shape.student,
        "FACTOR_CHANNELS": shape.factor,
        "STUDENT_PADDED": padded[0],
        "FACTOR_PADDED": padded[1],
        "STUDENT_BLOCK": min(padded[0], WIDEST_BLOCK),
        "FACTOR_BLOCK": min(padded[1], WIDEST_BLOCK),
        "ROWS": rows_for(shape.pixels),
        "NEEDS_INPUT": needs_input,
        "WEIGHTED": weighted,
        "NORMS": NORMS_BLOCK,
        "INPUT_PRECISION": "tf32",
        "num_warps": warps_for(shape.student, shape.factor),
        "num_stages": stages_for(shape.device, shape.student, shape.factor),
        "enable_fp_fusion": False,
    }
    return PlannedLaunch(_small_head_input_gradients_kernel, shape.samples, places, constants)
