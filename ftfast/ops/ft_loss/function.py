"""The loss as autograd sees it: the way from the public function to a backend, and one autograd.Function."""

from functools import partial
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ftfast import reference
from ftfast.arguments import check_factors, check_options
from ftfast.backends import KernelBackend, LossPlan, Options
from ftfast.dispatch import BACKENDS, choose, resolve
from ftfast.ops.differentiable import gradients_through_torch
from ftfast.ops.ft_loss import compiled as ft_loss_compiled
from ftfast.ops.ft_loss.plans import loss_plan
from ftfast.ops.memory import as_saved, is_batched, lies_in_memory, plain
from ftfast.ops.remembered import ORDINARY, Remembered, kind_of_weight
from ftfast.reference import scalar


class Chosen(NamedTuple):
    """Where calls of one kind run: a backend's launchers and its plan, or neither for the reference."""

    launchers: ModuleType | None
    plan: LossPlan | None


REFERENCE = Chosen(None, None)
# What does not change from step to step is checked and planned once.
_chosen: Remembered[tuple[Any, ...], Chosen] = Remembered()


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
    if torch.compiler.is_compiling():
        return _run_compiled(student_factor, teacher_factor, Options(p, reduction, eps, weight), backend)
    student, teacher = student_factor, teacher_factor
    reason = needs_torch_operators(student, teacher)
    kind = None if reason else _kind_of(student, teacher, p, reduction, eps, weight, backend)
    chosen = _chosen.get(kind)
    if chosen is None:
        chosen = _choose(student, teacher, Options(p, reduction, eps, weight), backend, reason, kind)
    launchers, plan = chosen
    eps = eps if type(eps) is float else float(eps)  # numpy's numbers and integers too
    if launchers is None:
        return reference.ft_loss(student, teacher, p=p, reduction=reduction, eps=eps, weight=weight)
    if plan is None or not lies_in_memory(student) or not lies_in_memory(teacher):
        student, teacher = plain(student), plain(teacher)
        plan = loss_plan(launchers, student, teacher, p, reduction, eps)
    weight, multiplier = (weight, None) if type(weight) is float else separate_weight(weight)
    if torch.is_grad_enabled() and (student.requires_grad or teacher.requires_grad):
        if student.is_inference():
            raise RuntimeError(
                "student_factor was made under torch.inference_mode and teacher_factor requires a gradient, which "
                "cannot keep it for backward; pass student_factor.clone()."
            )
        loss = FTLossFunction.apply(student, teacher, weight, plan)
    else:
        loss, _ = plan.forward(student, teacher, weight)
    return loss if multiplier is None else loss * scalar(multiplier, loss.dtype)


def _run_compiled(student: Tensor, teacher: Tensor, options: Options, backend: str) -> Tensor:
    p, reduction, eps, weight = options
    check_options(p=p, reduction=reduction, eps=eps, weight=weight)
    check_factors(student, teacher, weight)
    eps = float(eps)
    chosen = choose(backend, student, teacher)
    if chosen == "reference" or student.numel() == 0:
        return reference.ft_loss(student, teacher, p=p, reduction=reduction, eps=eps, weight=weight)
    weight, multiplier = separate_weight(weight)
    loss = ft_loss_compiled.ft_loss(student, teacher, Options(p, reduction, eps, weight), chosen)
    return loss if multiplier is None else loss * scalar(multiplier, loss.dtype)


def _kind_of(
    student: Tensor, teacher: Tensor, p: int, reduction: str, eps: float, weight: float | Tensor, backend: str
) -> tuple[Any, ...] | None:
    """What the checks of a call and its plan depend on; None where that is not told by what is quick to read."""
    if type(student) not in ORDINARY or type(teacher) not in ORDINARY or type(p) is not int or type(eps) is not float:
        return None
    if type(reduction) is not str:
        return None
    of_weight = float if type(weight) is float else kind_of_weight(weight)
    options = (p, reduction, eps, of_weight, resolve(backend), teacher.requires_grad)
    try:
        of_student = (student.shape, student.stride(), student.dtype, student.device)
        return (*options, *of_student, teacher.shape, teacher.stride(), teacher.dtype, teacher.device)
    except RuntimeError:  # a layout without strides
        return None


def _choose(
    student: Tensor, teacher: Tensor, options: Options, backend: str, reason: str, kind: tuple[Any, ...] | None
) -> Chosen:
    """Checks the arguments, raising in one sentence on those that no backend takes, and plans the call."""
    p, reduction, eps, weight = options
    check_options(p=p, reduction=reduction, eps=eps, weight=weight)
    check_factors(student, teacher, weight)
    name = choose(backend, student, teacher)
    if reason and name != "reference" and resolve(backend) != "auto":
        raise RuntimeError(f'backend "{name}" cannot run {reason}; use backend="reference".')
    found = BACKENDS[name]
    # An empty factor has no kernel to launch; the reference gives what torch's mean and sum give.
    if reason or not isinstance(found, KernelBackend) or student.numel() == 0:
        chosen = REFERENCE
    else:
        launchers = found.launchers(student.device)
        eps = float(eps)
        chosen = Chosen(launchers, None if kind is None else loss_plan(launchers, student, teacher, p, reduction, eps))
    return _chosen.keep(kind, chosen)


def separate_weight(weight: float | Tensor) -> tuple[float | Tensor, Tensor | None]:
    """The weight as the kernels take it, and what is left to multiply the loss with, where autograd must see that."""
    if isinstance(weight, Tensor):
        if weight.requires_grad:
            return 1.0, weight
        if weight.device.type == "cpu" and not torch.compiler.is_compiling():
            return weight.item(), None  # now, so that a later change of it does not reach this loss's backward
        if not torch.compiler.is_compiling():
            return plain(weight), None
    return weight, None


def needs_torch_operators(*factors: Tensor) -> str:
    """Why only torch's own operators will do: somebody watches them, or a factor's numbers do not lie in its memory."""
    if torch.compiler.is_compiling():
        return ""
    if reason := watched_by():
        return reason
    for factor in factors:
        if type(factor) not in ORDINARY and isinstance(factor, Tensor) and _intercepts(type(factor)):
            return f"on a {type(factor).__name__}"
    return ""


def watched_by() -> str:
    """Who watches torch's operators, here and now."""
    if torch._C._are_functorch_transforms_active():
        return "inside a torch.func transform"
    if torch.autograd.forward_ad._current_level >= 0:
        return "under forward-mode differentiation"
    if torch._C._len_torch_dispatch_stack() > 0 or torch._C._get_tracing_state() is not None:
        return "under a tracer or a dispatch mode"
    return ""


def _intercepts(kind: type[Tensor]) -> bool:
    """Whether a subclass of tensors computes torch's operators itself, as wrappers and fake tensors do."""
    return kind.__torch_dispatch__ is not Tensor.__torch_dispatch__


class FTLossFunction(torch.autograd.Function):
    """Saves the factors; beside lie O(N) scalars or, where the backend had better write it, the student's gradient."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, weight: float | Tensor, plan: Any) -> Tensor:
        ctx.plan = plan
        needed = ctx.needs_input_grad
        ctx.written_for = plan.expected_upstream if needed[0] and not needed[1] else None
        if ctx.written_for is not None:
            loss, ctx.gradient = plan.forward_with_gradient(student, teacher, weight, ctx.written_for)
            ctx.statistics = None
        else:
            loss, ctx.statistics = plan.forward(student, teacher, weight)
            ctx.gradient = None
        # A tensor made under inference_mode cannot be saved, and has no version that saving would guard.
        ctx.inference_teacher = teacher if teacher.is_inference() else None
        ctx.weight, saved_weight = (None, weight) if isinstance(weight, Tensor) else (weight, None)
        ctx.save_for_backward(student, teacher if ctx.inference_teacher is None else None, saved_weight)
        return loss

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        reads_memory = not (torch.is_grad_enabled() or is_batched(upstream))
        runs_again = torch._C._autograd._get_current_graph_task_keep_graph()
        gradient = ctx.gradient
        # The graph may be run again, and whoever receives the gradient may write to it.
        if not runs_again:
            ctx.gradient = None
        if gradient is not None and reads_memory and upstream.item() == ctx.written_for:
            return gradient.clone() if runs_again else gradient, None, None, None
        student, teacher, weight = ctx.saved_tensors
        teacher = ctx.inference_teacher if teacher is None else teacher
        student, teacher = as_saved((student, teacher), ctx.plan.layouts)
        weight = ctx.weight if weight is None else plain(weight)
        needed = ctx.needs_input_grad[:2]
        if not reads_memory:
            # Through the reference, which can be differentiated again.
            options = Options(ctx.plan.p, ctx.plan.reduction, ctx.plan.eps, weight)._asdict()
            loss = partial(reference.ft_loss, **options)
            return (*gradients_through_torch(loss, (student, teacher), needed, upstream), None, None)
        statistics = ctx.statistics
        if statistics is None:
            _, statistics = ctx.plan.forward(student, teacher, weight)
        return (*ctx.plan.backward(student, teacher, statistics, plain(upstream), weight, needed), None, None)
