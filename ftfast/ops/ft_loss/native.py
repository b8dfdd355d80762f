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
    statistics: int,
    p: int,
    reduction: str,
    eps: float,
    weight: float | Tensor,
    dtype: torch.dtype,
) -> Tensor:
    shape = student.shape
    per_sample = reduction == "none"
    loss = torch.empty(shape[:1] if per_sample else (), dtype=dtype, device=student.device)
    extension().ft_loss_forward(
        shape,
        _describe(student),
        _describe(teacher),
        gradient,
        loss.data_ptr(),
        statistics,
        p,
        not per_sample,
        eps,
        _scale(student, p, reduction, weight),
        torch.get_num_threads(),
    )
    return loss


def ft_loss_forward(
    student: Tensor, teacher: Tensor, *, p: int, reduction: str, eps: float, weight: float | Tensor
) -> tuple[Tensor, Tensor]:
    """``(loss, statistics [5, N])`` of factors ``[N, ...]``."""
    dtype = compute_dtype(student, teacher)
    statistics = torch.empty((5, student.shape[0]), dtype=dtype, device=student.device)
    return _forward(student, teacher, None, statistics.data_ptr(), p, reduction, eps, weight, dtype), statistics


def ft_loss_forward_with_gradient(
    student: Tensor, teacher: Tensor, p: int, reduction: str, eps: float, weight: float | Tensor
) -> tuple[Tensor, Tensor]:
    """``(loss, gradient)`` of factors of up to 32 bits: the student's gradient for an upstream gradient of 1."""
    gradient = torch.empty_like(student)
    loss = _forward(student, teacher, _describe(gradient), 0, p, reduction, eps, weight, torch.float32)
    return loss, gradient


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


def scale_rows(gradient: Tensor, upstream: Tensor) -> Tensor:
    """``gradient[n] *= upstream[n]`` in place; nothing to do where upstream is a 1, as it mostly is."""
    if upstream.dim():
        return gradient.mul_(upstream.reshape(-1, *(1,) * (gradient.dim() - 1)))
    return gradient if upstream.item() == 1 else gradient.mul_(upstream)
