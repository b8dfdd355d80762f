"""The loss as autograd sees it: the way from the public function to a backend, and one autograd.Function."""

from typing import Any

import torch
from torch import Tensor

from ftfast import reference
from ftfast.dispatch import choose, resolve
from ftfast.ops import ft_loss_compiled
from ftfast.ops import ft_loss_native as native
from ftfast.ops.ft_loss_check import MAX_DIMS, check_factors, check_options
from ftfast.ops.ft_loss_launch import Options, backward, forward
from ftfast.reference import compute_dtype

# Calls whose options, dtypes and devices were found good, and the backend that they run on: what does not change from
# step to step is checked once.
_approved: dict[tuple[Any, ...], str] = {}


def run(
    student_factor: Tensor,
    teacher_factor: Tensor,
    *,
    p: int,
    reduction: str,
    eps: float,
    weight: float | Tensor,
    backend: str,
) -> Tensor:
    """The loss on the chosen backend; see :func:`ftfast.ft_loss`."""
    chosen = _approve(student_factor, teacher_factor, p, reduction, eps, weight, backend)
    if chosen != "reference" and _transforming():
        if resolve(backend) != "auto":
            raise RuntimeError(
                f'backend "{chosen}" cannot run inside a torch.func transform; use backend="auto", which takes the '
                "reference there."
            )
        chosen = "reference"
    # An empty factor has no kernel to launch; the reference gives what torch's mean and sum give.
    if chosen == "reference" or student_factor.numel() == 0:
        return reference.ft_loss(student_factor, teacher_factor, p=p, reduction=reduction, eps=eps, weight=weight)
    if isinstance(weight, Tensor) and weight.requires_grad:
        return _run_kernels(student_factor, teacher_factor, Options(p, reduction, eps, 1.0), chosen) * weight
    return _run_kernels(student_factor, teacher_factor, Options(p, reduction, eps, weight), chosen)


def _approve(
    student: Tensor, teacher: Tensor, p: int, reduction: str, eps: float, weight: float | Tensor, backend: str
) -> str:
    """The backend for these arguments; raises in one sentence on those that no backend takes."""
    key: tuple[Any, ...] | None = None
    plain = type(student) is type(teacher) is Tensor and type(p) is int and type(eps) is type(weight) is float
    if plain and not torch.compiler.is_compiling():
        sides = (student.dtype, student.device, student.layout, teacher.dtype, teacher.device, teacher.layout)
        key = (p, reduction, eps, resolve(backend), *sides)
        chosen = _approved.get(key)
        if chosen and student.shape == teacher.shape and 2 <= student.dim() <= MAX_DIMS:
            return chosen
    check_options(p=p, reduction=reduction, eps=eps, weight=weight, backend=backend)
    check_factors(student, teacher, weight)
    chosen = choose(backend, student, teacher)
    if key is not None:
        _approved[key] = chosen
    return chosen


def _transforming() -> bool:
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


def _run_kernels(student: Tensor, teacher: Tensor, options: Options, backend: str) -> Tensor:
    if torch.compiler.is_compiling():
        return ft_loss_compiled.ft_loss(student, teacher, options, backend)
    if torch.is_grad_enabled() and (student.requires_grad or teacher.requires_grad):
        return FTLossFunction.apply(student, teacher, options, backend)
    return forward(student, teacher, options, backend)[0]


class FTLossFunction(torch.autograd.Function):
    """Saves the factors and O(N) scalars; or, for float32 on the CPU, the one gradient that forward wrote.

    There the factors are still in cache when the gradient can be written, which spares reading them a second time.
    """

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, options: Options, backend: str) -> Tensor:
        ctx.options, ctx.backend = options, backend
        needs_student, needs_teacher = ctx.needs_input_grad[:2]
        ctx.holds_gradient = (
            backend == "native"
            and needs_student
            and not needs_teacher
            and student.dtype == compute_dtype(student, teacher) == torch.float32
        )
        if ctx.holds_gradient:
            loss, gradient = native.ft_loss_forward_with_gradient(student, teacher, *options)
            ctx.save_for_backward(gradient)
            return loss
        loss, statistics = forward(student, teacher, options, backend)
        ctx.save_for_backward(student, teacher, statistics)
        return loss

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        differentiable = torch.is_grad_enabled()
        if ctx.holds_gradient:
            if differentiable:
                raise RuntimeError(
                    "a second derivative of ft_loss in float32 on the CPU is not kept by the native backend; use "
                    'backend="reference", or float64 factors.'
                )
            (gradient,) = ctx.saved_tensors
            if torch._C._autograd._get_current_graph_task_keep_graph():
                gradient = gradient.clone()  # the graph may be run again, and whoever receives this may write to it
            return native.scale_rows(gradient, upstream), None, None, None
        student, teacher, statistics = ctx.saved_tensors
        needed = ctx.needs_input_grad[:2]
        if differentiable:
            return (*_differentiable_backward(student, teacher, upstream, ctx.options, needed), None, None)
        return (*backward(student, teacher, statistics, upstream, ctx.options, ctx.backend, needed), None, None)


def _differentiable_backward(
    student: Tensor, teacher: Tensor, upstream: Tensor, options: Options, needed: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Under create_graph the gradient is taken through the reference, which can be differentiated again."""
    inputs = [factor for factor, need in zip((student, teacher), needed, strict=True) if need]
    loss = reference.ft_loss(student, teacher, **options._asdict())
    gradients = iter(torch.autograd.grad(loss, inputs, upstream, create_graph=True))
    return (next(gradients) if needed[0] else None), (next(gradients) if needed[1] else None)
