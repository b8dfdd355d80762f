"""The loss as library operators, ``ftfast::ft_loss_forward`` and ``ftfast::ft_loss_backward``, for compiled code.

Eager calls do not come here: an operator's boundary costs more than a small kernel. The weight stays outside the
operators: as an argument of them, every new value would be a recompilation.
"""

from typing import Any

import torch
from torch import Tensor

from ftfast.backends import KernelBackend, LossPlan, Options
from ftfast.dispatch import BACKENDS
from ftfast.ops.ft_loss.plans import loss_plan
from ftfast.reference import compute_dtype, scalar


def _plan(name: str, student: Tensor, teacher: Tensor, p: int, reduction: str, eps: float) -> LossPlan:
    backend = BACKENDS[name]
    assert isinstance(backend, KernelBackend)
    return loss_plan(backend.launchers(student.device), student, teacher, p, reduction, eps)


@torch.library.custom_op("ftfast::ft_loss_forward", mutates_args=())
def _forward_op(
    student: Tensor, teacher: Tensor, p: int, reduction: str, eps: float, backend: str
) -> tuple[Tensor, Tensor]:
    return _plan(backend, student, teacher, p, reduction, eps).forward(student, teacher, 1.0)


@torch.library.custom_op("ftfast::ft_loss_backward", mutates_args=())
def _backward_op(
    student: Tensor,
    teacher: Tensor,
    statistics: Tensor,
    upstream: Tensor,
    p: int,
    reduction: str,
    backend: str,
    needs_student: bool,
    needs_teacher: bool,
) -> tuple[Tensor, Tensor]:
    """A gradient that is not needed comes back empty: an operator's results cannot be None."""
    plan = _plan(backend, student, teacher, p, reduction, 0.0)
    needed = (needs_student, needs_teacher)
    for_student, for_teacher = plan.backward(student, teacher, statistics, upstream, 1.0, needed)
    return (
        statistics.new_empty(0) if for_student is None else for_student,
        statistics.new_empty(0) if for_teacher is None else for_teacher,
    )


@_forward_op.register_fake
def _(student: Tensor, teacher: Tensor, p: int, reduction: str, eps: float, backend: str) -> tuple[Tensor, Tensor]:
    dtype, samples = compute_dtype(student, teacher), student.shape[0]
    loss = student.new_empty((samples,) if reduction == "none" else (), dtype=dtype)
    return loss, student.new_empty((5, samples), dtype=dtype)


@_backward_op.register_fake
def _(
    student: Tensor,
    teacher: Tensor,
    statistics: Tensor,
    upstream: Tensor,
    p: int,
    reduction: str,
    backend: str,
    needs_student: bool,
    needs_teacher: bool,
) -> tuple[Tensor, Tensor]:
    return (
        torch.empty_like(student) if needs_student else statistics.new_empty(0),
        torch.empty_like(teacher) if needs_teacher else statistics.new_empty(0),
    )


def _save_for_op_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    student, teacher, p, reduction, _eps, backend = inputs
    ctx.save_for_backward(student, teacher, output[1])
    ctx.settings = (p, reduction, backend)
    ctx.set_materialize_grads(False)


def _op_backward(ctx: Any, upstream: Tensor | None, _statistics: Tensor | None) -> tuple[Tensor | None, ...]:
    options = (None, None, None, None)
    needed = ctx.needs_input_grad[:2]
    if upstream is None:
        return None, None, *options
    gradients = torch.ops.ftfast.ft_loss_backward(*ctx.saved_tensors, upstream, *ctx.settings, *needed)
    return (gradients[0] if needed[0] else None), (gradients[1] if needed[1] else None), *options


_forward_op.register_autograd(_op_backward, setup_context=_save_for_op_backward)


def ft_loss(student: Tensor, teacher: Tensor, options: Options, backend: str) -> Tensor:
    """The loss through the operators."""
    p, reduction, eps, weight = options
    loss = torch.ops.ftfast.ft_loss_forward(student, teacher, p, reduction, eps, backend)[0]
    return loss * scalar(weight, loss.dtype)
