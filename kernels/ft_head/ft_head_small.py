"""Triton kernel of a small head in a single pass: six convolutions, both norms, the loss and its direction, one launch.

One program owns one side of one image, teacher ``[H*W, Ct] -> Ct -> K -> K`` or student ``Cs -> Cs -> K -> K``, each
``z = conv3x3(x) + bias``, ``y = leaky_relu(z)``; of the two, the one that ends last goes on to the loss and the
direction, as in ft_head_loss.py. Maps between convolutions go through global memory, where a barrier makes them visible
to the program that wrote them. Kept for backward: the student's two maps in between, the direction, the reciprocal
norms.

Kim, Park, Kwak, "Paraphrasing Complex Network: Network Compression via Factor Transfer", NeurIPS 2018, section 3.
"""

# mypy: disallow-incomplete-defs=False
# (a kernel's parameters carry Triton's annotations, and only where Triton needs one)

from collections.abc import Sequence

import triton
import triton.language as tl

from ftfast.kernels.image_tiles import layer_of_image, load_image, store_image
from ftfast.kernels.launch import PlannedLaunch
from ftfast.kernels.layout import Place
from ftfast.kernels.loss_terms import finish_loss, reciprocal_distance, reciprocal_norm, square_root, terms_of

from .ft_head_loss import direction_of
from .ft_head_small_shape import HeadShape, rows_for, stages_for, warps_for
from .pack_weights import padded_channels

FOLD_BLOCK = 512
WIDEST_BLOCK = 64


@triton.jit
def _side(
    x, weight0, weight1, weight2, bias0, bias1, bias2, first, second, height, width, taps, negative_slope,
    CHANNELS: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr, FACTOR_CHANNELS: tl.constexpr,
    FACTOR_PADDED: tl.constexpr, FACTOR_BLOCK: tl.constexpr, ROWS: tl.constexpr, INPUT_PRECISION: tl.constexpr,
):  # fmt: skip
    """One image's factor ``[ROWS, FACTOR_PADDED]``; ``first`` and ``second`` take the maps in between."""
    y = layer_of_image(
        x, weight0, bias0, height, width, taps, negative_slope, CHANNELS, PADDED, CHANNELS, PADDED, ROWS, BLOCK,
        INPUT_PRECISION,
    )  # fmt: skip
    store_image(first, y, height * width, CHANNELS, PADDED, ROWS)
    tl.debug_barrier()
    y = layer_of_image(
        first, weight1, bias1, height, width, taps, negative_slope, CHANNELS, PADDED, FACTOR_CHANNELS, FACTOR_PADDED,
        ROWS, BLOCK, INPUT_PRECISION,
    )  # fmt: skip
    store_image(second, y, height * width, FACTOR_CHANNELS, FACTOR_PADDED, ROWS)
    tl.debug_barrier()
    return layer_of_image(
        second, weight2, bias2, height, width, taps, negative_slope, FACTOR_CHANNELS, FACTOR_PADDED, FACTOR_CHANNELS,
        FACTOR_PADDED, ROWS, FACTOR_BLOCK, INPUT_PRECISION,
    )  # fmt: skip


@triton.jit(do_not_specialize=["height", "width", "samples", "taps"])
def _small_head_forward_kernel(
    student,  # [N, H, W, Cs]
    teacher,  # [N, H, W, Ct]
    student_factor,  # [N, H, W, K], float32: scratch
    teacher_factor,  # [N, H, W, K]: given, or scratch
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
    counters,  # [N + 1]: of each image's sides, of the images
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
    SIDES: tl.constexpr,  # 1 where the teacher's factor is given, else 2
    P: tl.constexpr,
    PER_SAMPLE: tl.constexpr,
    WEIGHTED: tl.constexpr,
    ROWS: tl.constexpr,
    FOLD: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    n = (tl.program_id(0) // SIDES).to(tl.int64)
    pixels = height * width
    student_factor += n * pixels * FACTOR_CHANNELS
    teacher_factor += n * pixels * FACTOR_CHANNELS
    side = tl.program_id(0) % SIDES
    # Not an else: then the compiler keeps shared memory for both at once.
    if side == 0:
        s = _side(
            student + n * pixels * STUDENT_CHANNELS, student_weight0, student_weight1, student_weight2, student_bias0,
            student_bias1, student_bias2, a1 + n * pixels * STUDENT_CHANNELS, a2 + n * pixels * FACTOR_CHANNELS,
            height, width, taps, student_slope, STUDENT_CHANNELS, STUDENT_PADDED, STUDENT_BLOCK, FACTOR_CHANNELS,
            FACTOR_PADDED, FACTOR_BLOCK, ROWS, INPUT_PRECISION,
        )  # fmt: skip
        store_image(student_factor, s, pixels, FACTOR_CHANNELS, FACTOR_PADDED, ROWS)
    if side == 1:
        scratch += n * pixels * (TEACHER_CHANNELS + FACTOR_CHANNELS)
        t = _side(
            teacher + n * pixels * TEACHER_CHANNELS, teacher_weight0, teacher_weight1, teacher_weight2, teacher_bias0,
            teacher_bias1, teacher_bias2, scratch, scratch + pixels * TEACHER_CHANNELS, height, width, taps,
            teacher_slope, TEACHER_CHANNELS, TEACHER_PADDED, TEACHER_BLOCK, FACTOR_CHANNELS, FACTOR_PADDED,
            FACTOR_BLOCK, ROWS, INPUT_PRECISION,
        )  # fmt: skip
        store_image(teacher_factor, t, pixels, FACTOR_CHANNELS, FACTOR_PADDED, ROWS)
    # The barrier puts this program's stores before the count that releases them; L1 may hold stale lines, so .cg.
    tl.debug_barrier()
    if tl.atomic_add(counters + n, 1, sem="acq_rel") == SIDES - 1:
        tl.store(counters + n, 0)
        s = load_image(student_factor, pixels, FACTOR_CHANNELS, FACTOR_PADDED, ROWS, ".cg")
        t = load_image(teacher_factor, pixels, FACTOR_CHANNELS, FACTOR_PADDED, ROWS, ".cg")
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
        finish_loss(
            loss, distances, counters + samples, weight, distance, n, samples, scale, PER_SAMPLE, WEIGHTED, FOLD,
            tl.float32,
        )  # fmt: skip


def forward_launch(
    shape: HeadShape, places: Sequence[Place], *, p: int, per_sample: bool, weighted: bool
) -> PlannedLaunch:
    """The whole forward of a head that :func:`~ftfast.kernels.ft_head_small_shape.small_head_fits`, in one launch.

    Args:
        places: of the kernel's pointers, in their order.
        weighted: whether the weight is a tensor.
    """
    channels = (shape.student, shape.teacher or 1, shape.factor)
    padded = [padded_channels(count) for count in channels]
    sides = 1 if shape.teacher is None else 2
    constants = {
        "STUDENT_CHANNELS": channels[0],
        "TEACHER_CHANNELS": channels[1],
        "FACTOR_CHANNELS": channels[2],
        "STUDENT_PADDED": padded[0],
        "TEACHER_PADDED": padded[1],
        "FACTOR_PADDED": padded[2],
        "STUDENT_BLOCK": min(padded[0], WIDEST_BLOCK),
        "TEACHER_BLOCK": min(padded[1], WIDEST_BLOCK),
        "FACTOR_BLOCK": min(padded[2], WIDEST_BLOCK),
        "SIDES": sides,
        "P": p,
        "PER_SAMPLE": per_sample,
        "WEIGHTED": weighted,
        "ROWS": rows_for(shape.pixels),
        "FOLD": FOLD_BLOCK,
        "INPUT_PRECISION": "tf32",
        "num_warps": warps_for(*channels[:2]),
        "num_stages": stages_for(shape.device, *channels[:2]),
        "enable_fp_fusion": False,
    }
    return PlannedLaunch(_small_head_forward_kernel, shape.samples * sides, places, constants)
