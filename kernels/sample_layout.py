"""How a kernel walks over the samples of tensors that share a shape, whatever their strides: the plan, made on the
host, and the device functions that follow it.
"""

# mypy: disallow-incomplete-defs=False
# (a kernel's parameters carry Triton's annotations, and only where Triton needs one)

import math
from functools import lru_cache
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

MAXIMUM_RANK = 4
MAXIMUM_SPAN = 2**30  # elements of a sample whose strides go with every launch: they travel as _disguised int32


class Walk(NamedTuple):
    """What a kernel needs to find element i of sample n in each of several tensors."""

    rank: int  # 0: the tensors lie alike in memory and are walked in its order
    size: int  # D
    align: int  # elements; divides D, every row stride and every start address
    rows: tuple[int, ...]  # the strides of the first dimension, in units of align
    layout: tuple[int, ...]  # the sizes of the merged inner dimensions, then each tensor's strides, as _disguised

    @property
    def units(self) -> int:
        """D in units of align."""
        return self.size // self.align


def walk_over(*tensors: Tensor) -> tuple[Walk, tuple[Tensor, ...]]:
    """The walk over ``[N, ...]`` tensors of one shape, and the tensors to launch with.

    These are the same tensors, or contiguous copies where more than ``MAXIMUM_RANK`` inner dimensions are left after
    merging, or where a sample with unlike strides spans ``MAXIMUM_SPAN`` elements or more.
    """
    walk = _plan(tensors[0].shape, tuple(tensor.stride() for tensor in tensors))
    if walk is None:
        tensors = tuple(tensor.contiguous() for tensor in tensors)
        walk = _plan(tensors[0].shape, tuple(tensor.stride() for tensor in tensors))
        assert walk is not None
    align = math.gcd(walk.align, *(tensor.data_ptr() // tensor.element_size() for tensor in tensors))
    if align != walk.align:
        walk = walk._replace(align=align, rows=tuple(row * walk.align // align for row in walk.rows))
    return walk, tensors


@lru_cache(maxsize=4096)
def _plan(shape: tuple[int, ...], strides: tuple[tuple[int, ...], ...]) -> Walk | None:
    inner = [(shape[axis], tuple(stride[axis] for stride in strides)) for axis in range(1, len(shape))]
    merged: list[tuple[int, tuple[int, ...]]] = []
    for length, steps in sorted((axis for axis in inner if axis[0] != 1), key=lambda axis: axis[1], reverse=True):
        if merged and all(outer == length * step for outer, step in zip(merged[-1][1], steps, strict=True)):
            merged[-1] = (merged[-1][0] * length, steps)
        else:
            merged.append((length, steps))
    size = math.prod(shape[1:])
    rows = tuple(stride[0] if shape[0] > 1 else 0 for stride in strides)
    if not merged or (len(merged) == 1 and all(step == 1 for step in merged[0][1])):
        # Of D only the channel count is asked, so that a new map size keeps its kernel.
        align = math.gcd(16, shape[1], *rows)
        return Walk(0, size, align, tuple(row // align for row in rows), ())
    spans = (sum((length - 1) * steps[which] for length, steps in merged) for which in range(len(strides)))
    if len(merged) > MAXIMUM_RANK or max(size, *spans) >= MAXIMUM_SPAN:
        return None
    layout = [length for length, _ in merged]
    for which in range(len(strides)):
        layout += [steps[which] for _, steps in merged]
    return Walk(len(merged), size, 1, rows, tuple(_disguised(number) for number in layout))


def _disguised(number: int) -> int:
    # Triton compiles anew for a 1 or a multiple of 16 in a tuple, whatever do_not_specialize says. This is neither.
    return 2 * number + 3


@triton.jit
def _entry(layout, INDEX: tl.constexpr):
    return (layout[INDEX] - 3) >> 1


@triton.jit
def addresses(base, start, lanes, layout, WHICH: tl.constexpr, RANK: tl.constexpr, ALIGN: tl.constexpr):
    """Addresses of elements ``start + lanes`` of a sample; ``layout`` holds the sizes, then each tensor's strides."""
    if RANK == 0:
        # The hint stands on the addresses themselves: one step earlier the compiler folds it away, and with it every
        # 16-byte load.
        return tl.multiple_of(base + start + lanes, ALIGN * (base.dtype.element_ty.primitive_bitwidth // 8))
    else:
        rest = (start + lanes).to(tl.int32)
        offset = tl.zeros_like(lanes)
        for axis in tl.static_range(RANK - 1, 0, -1):
            length = _entry(layout, axis)
            outer = rest // length
            offset += (rest - outer * length) * _entry(layout, RANK * WHICH + axis)
            rest = outer
        return base + (offset + rest * _entry(layout, RANK * WHICH))


@triton.jit
def load(
    base,
    start,
    lanes,
    mask,
    layout,
    WHICH: tl.constexpr,
    RANK: tl.constexpr,
    ALIGN: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Elements ``start + lanes`` of a sample in DTYPE, 0 outside the mask."""
    values = tl.load(addresses(base, start, lanes, layout, WHICH, RANK, ALIGN), mask=mask, other=0.0)
    if values.dtype.primitive_bitwidth <= 16:
        values = values.to(tl.float32)  # the interpreter knows no other way to float64
    return values.to(DTYPE)


@triton.jit
def store(
    base,
    values,
    start,
    lanes,
    mask,
    layout,
    WHICH: tl.constexpr,
    RANK: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """Rounds to the dtype of the tensor at ``base`` and writes elements ``start + lanes`` of a sample."""
    if base.dtype.element_ty.primitive_bitwidth <= 16:
        values = values.to(tl.float32)
    values = values.to(base.dtype.element_ty)
    tl.store(addresses(base, start, lanes, layout, WHICH, RANK, ALIGN), values, mask=mask)


@triton.jit
def remaining(size, start, BLOCK: tl.constexpr, ALIGN: tl.constexpr):
    """How many lanes of the block at ``start`` hold elements; ``size`` counts units of ALIGN."""
    # Counted in units too, so that the compiler knows the mask to change at multiples of ALIGN only.
    return tl.minimum(size - start // ALIGN, BLOCK // ALIGN).to(tl.int32) * ALIGN
