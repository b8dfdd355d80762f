"""The loss through ftfast._C on the CPU: allocates the results and hands addresses and strides to C++.

The arguments were checked by ftfast.ops.ft_loss.function; the extension trusts what it gets.
"""

import torch
from torch import Tensor

from ftfast.extension import extension
from ftfast.reference import compute_dtype, reduction_divisor

_DTYPE_CODES = {
    torch.float64: 0,
    torch.float32: 1,
    torch.bfloat16: 2,
    torch.float16: 3,
    torch.int8: 4,
    torch.float8_e4m3fn: 5,
}

Described = tuple[int, int, tuple[int, ...]]


def _describe(factor: Tensor) -> Described:
    return factor.data_ptr(), _DTYPE_CODES[factor.dtype], factor.stride()


def _scale(factor: Tensor, p: int, reduction: str, weight: float | Tensor) -> float:
    number = weight.item() if isinstance(weight, Tensor) else weight
    samples = factor.shape[0]
    return number / reduction_divisor(samples, factor.numel() // samples, p=p, reduction=reduction)


def _forward(
    student: Tensor,
    teacher: Tensor,
    gradient: Described | None,
    p: int,
    reduction: str,
    eps: float,
    weight: float | Tensor,
    upstream: float = 1.0,
) -> tuple[Tensor, Tensor]:
    shape, dtype = student.shape, compute_dtype(student, teacher)
    per_sample = reduction == "none"
    loss = torch.empty(shape[:1] if per_sample else (), dtype=dtype, device=student.device)
    statistics = torch.empty((5, shape[0]), dtype=dtype, device=student.device)
    extension().ft_loss_forward(
        shape,
        _describe(student),
        _describe(teacher),
        gradient,
        loss.data_ptr(),
        statistics.data_ptr(),
        p,
        not per_sample,
        eps,
        _scale(student, p, reduction, weight),
        upstream,
        torch.get_num_threads(),
    )
    return loss, statistics


def ft_loss_forward(
    student: Tensor, teacher: Tensor, *, p: int, reduction: str, eps: float, weight: float | Tensor
) -> tuple[Tensor, Tensor]:
    """``(loss, statistics [5, N])`` of factors ``[N, ...]``."""
    return _forward(student, teacher, None, p, reduction, eps, weight)


def ft_loss_forward_with_gradient(
    student: Tensor,
    teacher: Tensor,
    p: int,
    reduction: str,
    eps: float,
    weight: float | Tensor,
    upstream: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """``(loss, statistics, gradient)``: the student's gradient that :func:`ft_loss_backward` gives for ``upstream``."""
    gradient = torch.empty_like(student)
    return *_forward(student, teacher, _describe(gradient), p, reduction, eps, weight, upstream), gradient


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
    """The gradients that are asked for, in their factor's dtype and strides; upstream is 0-d or ``[N]``."""
    for_student = torch.empty_like(student) if student_gradient else None
    for_teacher = torch.empty_like(teacher) if teacher_gradient else None
    extension().ft_loss_backward(
        student.shape,
        _describe(student),
        _describe(teacher),
        None if for_student is None else _describe(for_student),
        None if for_teacher is None else _describe(for_teacher),
        statistics.data_ptr(),
        upstream.data_ptr(),
        upstream.stride(0) if upstream.dim() else 0,
        p,
        _scale(student, p, reduction, weight),
        torch.get_num_threads(),
    )
    return for_student, for_teacher
