"""Triton kernels of the factor transfer loss and their launchers: one launch forward, one launch backward.

Forward: one program owns one sample. Up to ``REGISTER_SIZE`` numbers a sample stays in registers and is read once; a
larger one is read twice, the second time mostly from the L2 cache. The program that arrives last adds up the samples
in a fixed order, so a result is bit-equal from run to run. Backward reads both factors once more and writes the
gradients; between the two only five numbers a sample are kept.
"""

# mypy: disallow-incomplete-defs=False
# (a kernel's parameters carry Triton's annotations, and only where Triton needs one)

import torch
import triton
import triton.language as tl
from torch import Tensor

from .device import arrival_counters, device_guard
from .launch import launch
from .loss_numbers import norm_floor, reduction_scale, split_weight
from .loss_terms import (
    finish_loss,
    loss_factor,
    reciprocal_distance,
    reciprocal_norm,
    square_root,
    sums_of_sample,
    terms_of,
)
from .sample_layout import load, remaining, store, walk_over

# The largest samples that stay in registers without a spill.
REGISTER_SIZE = 16384
REGISTER_SIZE_RANK_4 = 8192
REGISTER_SIZE_FLOAT64 = 4096
TWO_PASS_BLOCK = 4096
TWO_PASS_BLOCK_FLOAT64 = 2048
TWO_PASS_WARPS = 16  # with fewer a strided walk spills
BACKWARD_BLOCK = 2048
SMALLEST_BLOCK = 128
FOLD_BLOCK = 512

# What varies from step to step must not be part of Triton's cache key; alignment arrives as the constant ALIGN.
_RUNTIME_NUMBERS = ["student_row", "teacher_row", "size", "samples"]
_FORWARD_POINTERS = ["student", "teacher", "loss", "statistics", "counter", "weight"]
_BACKWARD_POINTERS = ["student", "teacher", "statistics", "upstream", "weight", "student_grad", "teacher_grad"]
_BACKWARD_NUMBERS = [*_RUNTIME_NUMBERS, "student_grad_row", "teacher_grad_row", "upstream_stride", "splits"]


@triton.jit(do_not_specialize=_RUNTIME_NUMBERS, do_not_specialize_on_alignment=_FORWARD_POINTERS)
def _ft_loss_forward_kernel(
    student, teacher, loss, statistics, counter, weight,
    student_row: tl.int64, teacher_row: tl.int64, size: tl.int64, samples: tl.int64,
    eps: tl.float64, scale: tl.float64, layout,
    P: tl.constexpr, PER_SAMPLE: tl.constexpr, WEIGHTED: tl.constexpr, RANK: tl.constexpr, ALIGN: tl.constexpr,
    SINGLE_PASS: tl.constexpr, BLOCK: tl.constexpr, FOLD: tl.constexpr,
):  # fmt: skip
    DTYPE: tl.constexpr = statistics.dtype.element_ty
    n = tl.program_id(0).to(tl.int64)
    student_base = student + n * (student_row * ALIGN)
    teacher_base = teacher + n * (teacher_row * ALIGN)
    lanes = tl.arange(0, BLOCK)
    zero = n * 0
    if SINGLE_PASS:
        mask = lanes < remaining(size, zero, BLOCK, ALIGN)
        x = load(student_base, zero, lanes, mask, layout, 1, RANK, ALIGN, DTYPE)
        y = load(teacher_base, zero, lanes, mask, layout, 2, RANK, ALIGN, DTYPE)
        student_squares = tl.sum(x * x, 0)
        teacher_squares = tl.sum(y * y, 0)
    else:
        student_squares, teacher_squares, _ = sums_of_sample(
            student_base, teacher_base, 1.0, 1.0, size, lanes, layout, True, P, RANK, ALIGN, BLOCK, DTYPE
        )
    floor = tl.full((), eps, DTYPE)
    student_inverse, student_clamped = reciprocal_norm(student_squares, floor)
    teacher_inverse, teacher_clamped = reciprocal_norm(teacher_squares, floor)
    if SINGLE_PASS:
        distance_terms, student_terms, teacher_terms = terms_of(x * student_inverse, y * teacher_inverse, P)
        distance = tl.sum(distance_terms, 0)
        student_product = tl.sum(student_terms, 0)
        teacher_product = tl.sum(teacher_terms, 0)
    else:
        distance, student_product, teacher_product = sums_of_sample(
            student_base, teacher_base, student_inverse, teacher_inverse, size, lanes, layout, False, P, RANK, ALIGN,
            BLOCK, DTYPE,
        )  # fmt: skip
    if P == 2:
        distance = square_root(distance)
        inverse_distance = reciprocal_distance(distance, 1.0)
        student_product *= inverse_distance
        teacher_product *= inverse_distance
    tl.store(statistics + n, student_inverse)
    tl.store(statistics + samples + n, teacher_inverse)
    tl.store(statistics + 2 * samples + n, tl.where(student_clamped, 0.0, student_product))
    tl.store(statistics + 3 * samples + n, tl.where(teacher_clamped, 0.0, teacher_product))
    distances = statistics + 4 * samples
    finish_loss(loss, distances, counter, weight, distance, n, samples, scale, PER_SAMPLE, WEIGHTED, FOLD, DTYPE)


@triton.jit(do_not_specialize=_BACKWARD_NUMBERS, do_not_specialize_on_alignment=_BACKWARD_POINTERS)
def _ft_loss_backward_kernel(
    student, teacher, statistics, upstream, weight, student_grad, teacher_grad,
    student_row: tl.int64, teacher_row: tl.int64, student_grad_row: tl.int64, teacher_grad_row: tl.int64,
    upstream_stride: tl.int64, size: tl.int64, samples: tl.int64, splits: tl.int32, scale: tl.float64, layout,
    P: tl.constexpr, WEIGHTED: tl.constexpr, STUDENT: tl.constexpr, TEACHER: tl.constexpr, RANK: tl.constexpr,
    ALIGN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    DTYPE: tl.constexpr = statistics.dtype.element_ty
    program = tl.program_id(0)
    n = (program // splits).to(tl.int64)
    start = (program % splits).to(tl.int64) * BLOCK
    lanes = tl.arange(0, BLOCK)
    mask = lanes < remaining(size, start, BLOCK, ALIGN)
    student_inverse = tl.load(statistics + n)
    teacher_inverse = tl.load(statistics + samples + n)
    # The upstream gradient, the weight and the reduction meet here, before the one rounding to the factor's dtype.
    factor = tl.load(upstream + n * upstream_stride).to(DTYPE) * loss_factor(scale, weight, WEIGHTED, DTYPE)
    student_base = student + n * (student_row * ALIGN)
    teacher_base = teacher + n * (teacher_row * ALIGN)
    x = load(student_base, start, lanes, mask, layout, 1, RANK, ALIGN, DTYPE)
    y = load(teacher_base, start, lanes, mask, layout, 2, RANK, ALIGN, DTYPE)
    a = x * student_inverse
    b = y * teacher_inverse
    difference = a - b
    if P == 1:
        direction = (difference > 0).to(DTYPE) - (difference < 0).to(DTYPE)
    else:
        distance = tl.load(statistics + 4 * samples + n)
        direction = difference * reciprocal_distance(distance, 1.0)
    if STUDENT:
        student_product = tl.load(statistics + 2 * samples + n)
        gradient = (direction - a * student_product) * (factor * student_inverse)
        base = student_grad + n * (student_grad_row * ALIGN)
        store(base, gradient, start, lanes, mask, layout, 3, RANK, ALIGN)
    if TEACHER:
        teacher_product = tl.load(statistics + 3 * samples + n)
        gradient = (b * teacher_product - direction) * (factor * teacher_inverse)
        base = teacher_grad + n * (teacher_grad_row * ALIGN)
        store(base, gradient, start, lanes, mask, layout, 3 + STUDENT, RANK, ALIGN)


def _bucket(size: int) -> int:
    return max(SMALLEST_BLOCK, 1 << (size - 1).bit_length())


def _warps(block: int) -> int:
    return min(max(block // 512, 1), 16)


def compiled_kernels() -> int:
    """How many kernels Triton has compiled or loaded for these launchers in this process; 0 in the interpreter."""
    count = 0
    for kernel in (_ft_loss_forward_kernel, _ft_loss_backward_kernel):
        count += sum(len(cached[0]) for cached in getattr(kernel, "device_caches", {}).values())
    return count


def ft_loss_forward(
    student: Tensor, teacher: Tensor, *, p: int, reduction: str, eps: float, weight: float | Tensor
) -> tuple[Tensor, Tensor]:
    """The loss of :func:`ftfast.ft_loss` and what its backward needs, in one launch.

    Args:
        student: ``[N, ...]`` with N >= 1 and D >= 1 numbers a sample, float64, float32, bfloat16 or float16, any
            strides, on a GPU (on the CPU in Triton's interpreter). Nothing is checked here.
        teacher: the same shape and device; also int8 or float8_e4m3fn.
        p: 1 or 2.
        reduction: "mean", "batchmean", "sum" or "none".
        eps: the floor of a norm, at least 0; between 0 and the smallest normal number it counts as the latter.
        weight: a number, or a 0-d tensor on the same device or on the CPU.

    Returns:
        The loss, 0-d (``[N]`` for "none"), and statistics ``[5, N]``: both reciprocal norms, ``<g, a>`` and
        ``<g, b>`` (0 where the norm is clamped), and ``l``. Both are float64 where an input is, else float32.
    """
    dtype = torch.float64 if torch.float64 in (student.dtype, teacher.dtype) else torch.float32
    walk, (student, teacher) = walk_over(student, teacher)
    samples, size, device = student.shape[0], walk.size, student.device
    if dtype == torch.float64:
        register_size = REGISTER_SIZE_FLOAT64
    else:
        register_size = REGISTER_SIZE_RANK_4 if walk.rank == 4 else REGISTER_SIZE
    single_pass = size <= register_size
    if single_pass:
        block = _bucket(size)
        warps = _warps(block)
    else:
        block = TWO_PASS_BLOCK_FLOAT64 if dtype == torch.float64 else TWO_PASS_BLOCK
        warps = TWO_PASS_WARPS
    factor, weight_tensor = split_weight(weight, device)
    per_sample = reduction == "none"
    loss = torch.empty((samples,) if per_sample else (), dtype=dtype, device=device)
    statistics = torch.empty((5, samples), dtype=dtype, device=device)
    with device_guard(device):
        launch(
            _ft_loss_forward_kernel,
            samples,
            (
                student,
                teacher,
                loss,
                statistics,
                statistics if per_sample else arrival_counters(device),
                statistics if weight_tensor is None else weight_tensor,
            ),
            (
                walk.rows[0],
                walk.rows[1],
                walk.units,
                samples,
                norm_floor(eps, dtype),
                reduction_scale(samples, size, p, reduction) * factor,
                walk.layout,
            ),
            {
                "P": p,
                "PER_SAMPLE": per_sample,
                "WEIGHTED": weight_tensor is not None,
                "RANK": walk.rank,
                "ALIGN": walk.align,
                "SINGLE_PASS": single_pass,
                "BLOCK": block,
                "FOLD": FOLD_BLOCK,
                "num_warps": warps,
                "enable_fp_fusion": False,
            },
        )
    return loss, statistics


def ft_loss_backward(
    student: Tensor,
    teacher: Tensor,
    statistics: Tensor,
    upstream: Tensor,
    *,
    p: int,
    reduction: str,
    weight: float | Tensor,
    student_gradient: bool,
    teacher_gradient: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of :func:`ft_loss_forward`, both in one launch where both are asked for.

    Args:
        student, teacher, p, reduction, weight: as forward got them.
        statistics: as forward returned it.
        upstream: the gradient of the loss, 0-d, or ``[N]`` with any stride for "none".
        student_gradient, teacher_gradient: which gradients to compute, one at least.

    Returns:
        The gradients, each with the dtype of its factor and the strides of ``torch.empty_like``, or None.
    """
    student_grad = torch.empty_like(student) if student_gradient else None
    teacher_grad = torch.empty_like(teacher) if teacher_gradient else None
    grads = [grad for grad in (student_grad, teacher_grad) if grad is not None]
    walk, tensors = walk_over(student, teacher, *grads)
    samples, device = student.shape[0], student.device
    block = min(_bucket(walk.size), BACKWARD_BLOCK)
    splits = -(-walk.size // block)
    factor, weight_tensor = split_weight(weight, device)
    with device_guard(device):
        launch(
            _ft_loss_backward_kernel,
            samples * splits,
            (
                tensors[0],
                tensors[1],
                statistics,
                upstream,
                statistics if weight_tensor is None else weight_tensor,
                tensors[2],
                tensors[-1],
            ),
            (
                walk.rows[0],
                walk.rows[1],
                walk.rows[2],
                walk.rows[-1],
                upstream.stride(0) if upstream.ndim else 0,
                walk.units,
                samples,
                splits,
                reduction_scale(samples, walk.size, p, reduction) * factor,
                walk.layout,
            ),
            {
                "P": p,
                "WEIGHTED": weight_tensor is not None,
                "STUDENT": student_gradient,
                "TEACHER": teacher_gradient,
                "RANK": walk.rank,
                "ALIGN": walk.align,
                "BLOCK": block,
                "num_warps": _warps(block),
                "enable_fp_fusion": False,
            },
        )
    for grad, computed in zip(grads, tensors[2:], strict=True):
        if computed is not grad:
            grad.copy_(computed)
    return student_grad, teacher_grad


class LossPlan:
    """The launches for factors of one kind: p, reduction and eps; the rest is found by what the factors are."""

    expected_upstream = None

    def __init__(self, student: Tensor, teacher: Tensor, p: int, reduction: str, eps: float) -> None:
        self.p, self.reduction, self.eps = p, reduction, eps

    def forward(self, student: Tensor, teacher: Tensor, weight: float | Tensor) -> tuple[Tensor, Tensor]:
        """:func:`ft_loss_forward`."""
        return ft_loss_forward(student, teacher, p=self.p, reduction=self.reduction, eps=self.eps, weight=weight)

    def backward(
        self,
        student: Tensor,
        teacher: Tensor,
        statistics: Tensor,
        upstream: Tensor,
        weight: float | Tensor,
        needed: tuple[bool, bool],
    ) -> tuple[Tensor | None, Tensor | None]:
        """:func:`ft_loss_backward` of the gradients that are needed."""
        return ft_loss_backward(
            student,
            teacher,
            statistics,
            upstream,
            p=self.p,
            reduction=self.reduction,
            weight=weight,
            student_gradient=needed[0],
            teacher_gradient=needed[1],
        )
