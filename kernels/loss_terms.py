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
def sums_of_sample(
    student_base, teacher_base, student_inverse, teacher_inverse, size, lanes, layout,
    SQUARES: tl.constexpr, P: tl.constexpr, RANK: tl.constexpr, ALIGN: tl.constexpr, BLOCK: tl.constexpr,
    DTYPE: tl.constexpr,
):  # fmt: skip
    """The sums over a sample that registers do not hold: of :func:`terms_of`; or ``|s|^2``, ``|t|^2`` and 0."""
    first_total = tl.full((), 0.0, tl.float64)
    second_total = tl.full((), 0.0, tl.float64)
    third_total = tl.full((), 0.0, tl.float64)
    end = size * ALIGN
    for first in range(end * 0, end, BLOCK * FOLD_STEPS):
        first_sums = tl.zeros((BLOCK,), DTYPE)
        second_sums = tl.zeros((BLOCK,), DTYPE)
        third_sums = tl.zeros((BLOCK,), DTYPE)
        for start in range(first, tl.minimum(first + BLOCK * FOLD_STEPS, end), BLOCK):
            mask = lanes < remaining(size, start, BLOCK, ALIGN)
            x = load(student_base, start, lanes, mask, layout, 1, RANK, ALIGN, DTYPE)
            y = load(teacher_base, start, lanes, mask, layout, 2, RANK, ALIGN, DTYPE)
            if SQUARES:
                first_sums += x * x
                second_sums += y * y
            else:
                terms = terms_of(x * student_inverse, y * teacher_inverse, P)
                first_sums += terms[0]
                second_sums += terms[1]
                third_sums += terms[2]
        first_total += tl.sum(first_sums, 0).to(tl.float64)
        second_total += tl.sum(second_sums, 0).to(tl.float64)
        third_total += tl.sum(third_sums, 0).to(tl.float64)
    return first_total.to(DTYPE), second_total.to(DTYPE), third_total.to(DTYPE)


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


@triton.jit
def finish_loss(
    loss, distances, counter, weight, distance, n, samples, scale,
    PER_SAMPLE: tl.constexpr, WEIGHTED: tl.constexpr, FOLD: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Stores l of sample n; the program that arrives last adds up all ``distances [N]`` in order, into the loss."""
    tl.store(distances + n, distance)
    if PER_SAMPLE:
        tl.store(loss + n, distance * loss_factor(scale, weight, WEIGHTED, DTYPE))
    else:
        # The barrier puts this program's store before the count that releases it; L1 may hold stale lines, so .cg.
        tl.debug_barrier()
        if tl.atomic_add(counter, 1, sem="acq_rel") == samples - 1:
            total = tl.zeros((FOLD,), DTYPE)
            for start in range(samples * 0, samples, FOLD):
                row = start + tl.arange(0, FOLD)
                total += tl.load(distances + row, mask=row < samples, other=0.0, cache_modifier=".cg")
            tl.store(loss, tl.sum(total, 0) * loss_factor(scale, weight, WEIGHTED, DTYPE))
            tl.store(counter, 0)
