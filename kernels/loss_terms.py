"""The arithmetic that every kernel of the factor transfer loss shares, whatever it keeps for backward."""

# mypy: disallow-incomplete-defs=False
# (a kernel's parameters carry Triton's annotations, and only where Triton needs one)

import triton
import triton.language as tl

from .sample_layout import load, remaining

# Blocks of a long sample that are added up before their sums are folded into double: a longer run of equal numbers is
# rounded the same way each time.
FOLD_STEPS = tl.constexpr(64)


@triton.jit
def square_root(x):
    """Correct for subnormal sums too."""
    # tl.sqrt of float32 flushes subnormal sums to 0.
    if x.dtype == tl.float64:
        return tl.sqrt(x)
    else:
        return tl.sqrt_rn(x)


@triton.jit
def reciprocal_norm(squares, floor):
    """``1 / max(norm, floor)`` from the sum of squares, and whether the floor was taken."""
    norm = square_root(squares)
    # Written so that a NaN norm stays one.
    clamped = norm <= floor
    return 1.0 / tl.where(clamped, floor, norm), clamped


@triton.jit
def reciprocal_distance(distance, numerator):
    """``numerator / l``, and 0 where l is: there is no direction then, even where small differences are not 0."""
    return tl.where(distance == 0, 0.0, numerator / tl.where(distance == 0, 1.0, distance))


@triton.jit
def squares_of_sample(
    student_base, teacher_base, size, lanes, layout,
    RANK: tl.constexpr, ALIGN: tl.constexpr, BLOCK: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """``|s|^2`` and ``|t|^2`` of a sample that registers do not hold."""
    student_total = tl.full((), 0.0, tl.float64)
    teacher_total = tl.full((), 0.0, tl.float64)
    end = size * ALIGN
    for first in range(end * 0, end, BLOCK * FOLD_STEPS):
        student_squares = tl.zeros((BLOCK,), DTYPE)
        teacher_squares = tl.zeros((BLOCK,), DTYPE)
        for start in range(first, tl.minimum(first + BLOCK * FOLD_STEPS, end), BLOCK):
            mask = lanes < remaining(size, start, BLOCK, ALIGN)
            x = load(student_base, start, lanes, mask, layout, 1, RANK, ALIGN, DTYPE)
            y = load(teacher_base, start, lanes, mask, layout, 2, RANK, ALIGN, DTYPE)
            student_squares += x * x
            teacher_squares += y * y
        student_total += tl.sum(student_squares, 0).to(tl.float64)
        teacher_total += tl.sum(teacher_squares, 0).to(tl.float64)
    return student_total.to(DTYPE), teacher_total.to(DTYPE)


@triton.jit
def terms_of_sample(
    student_base, teacher_base, student_inverse, teacher_inverse, size, lanes, layout,
    P: tl.constexpr, RANK: tl.constexpr, ALIGN: tl.constexpr, BLOCK: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """The sums of :func:`terms_of` over a sample that registers do not hold."""
    distance_total = tl.full((), 0.0, tl.float64)
    student_total = tl.full((), 0.0, tl.float64)
    teacher_total = tl.full((), 0.0, tl.float64)
    end = size * ALIGN
    for first in range(end * 0, end, BLOCK * FOLD_STEPS):
        distance_terms = tl.zeros((BLOCK,), DTYPE)
        student_terms = tl.zeros((BLOCK,), DTYPE)
        teacher_terms = tl.zeros((BLOCK,), DTYPE)
        for start in range(first, tl.minimum(first + BLOCK * FOLD_STEPS, end), BLOCK):
            mask = lanes < remaining(size, start, BLOCK, ALIGN)
            x = load(student_base, start, lanes, mask, layout, 1, RANK, ALIGN, DTYPE)
            y = load(teacher_base, start, lanes, mask, layout, 2, RANK, ALIGN, DTYPE)
            terms = terms_of(x * student_inverse, y * teacher_inverse, P)
            distance_terms += terms[0]
            student_terms += terms[1]
            teacher_terms += terms[2]
        distance_total += tl.sum(distance_terms, 0).to(tl.float64)
        student_total += tl.sum(student_terms, 0).to(tl.float64)
        teacher_total += tl.sum(teacher_terms, 0).to(tl.float64)
    return distance_total.to(DTYPE), student_total.to(DTYPE), teacher_total.to(DTYPE)


@triton.jit
def loss_factor(scale, weight, WEIGHTED: tl.constexpr, DTYPE: tl.constexpr):
    """What l is multiplied with: the reduction's scale, and the weight where that is a tensor."""
    factor = tl.full((), scale, DTYPE)
    if WEIGHTED:
        factor *= tl.load(weight).to(DTYPE)
    return factor


@triton.jit
def terms_of(a, b, P: tl.constexpr):
    """What adds up to l (squared for P = 2) and to <g, a> and <g, b>, with g not yet divided by l for P = 2."""
    difference = a - b
    if P == 1:
        sign = (difference > 0).to(a.dtype) - (difference < 0).to(a.dtype)
        return tl.abs(difference), sign * a, sign * b
    else:
        return difference * difference, difference * a, difference * b
