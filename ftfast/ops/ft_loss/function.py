"""The loss as autograd sees it: the way from the public function to a backend, and one autograd.Function."""

from typing import Any

import torch
from torch import Tensor, nn

from ftfast import reference
from ftfast.arguments import MAX_DIMS, check_factors, check_options
from ftfast.backends import KernelBackend, Options
from ftfast.dispatch import BACKENDS, choose, resolve
from ftfast.ops.ft_loss import compiled as ft_loss_compiled
from ftfast.ops.memory import plain, save, saved
from ftfast.reference import scalar

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
    eps = eps if isinstance(eps, float) else float(eps)  # numpy's numbers and integers too
    if chosen != "reference" and (reason := needs_torch_operators(student_factor, teacher_factor)):
        if resolve(backend) != "auto":
            raise RuntimeError(f'backend "{chosen}" cannot run {reason}; use backend="reference".')
        chosen = "reference"
    # An empty factor has no kernel to launch; the reference gives what torch's mean and sum give.
    if chosen == "reference" or student_factor.numel() == 0:
        return reference.ft_loss(student_factor, teacher_factor, p=p, reduction=reduction, eps=eps, weight=weight)
    weight, multiplier = separate_weight(weight)
    loss = _run_kernels(student_factor, teacher_factor, Options(p, reduction, eps, weight), chosen)
    return loss if multiplier is None else loss * scalar(multiplier, loss.dtype)


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


def _approve(
    student: Tensor, teacher: Tensor, p: int, reduction: str, eps: float, weight: float | Tensor, backend: str
) -> str:
    """The backend for these arguments; raises in one sentence on those that no backend takes."""
    key: tuple[Any, ...] | None = None
    plain = type(student) is type(teacher) is Tensor and type(p) is int and type(eps) is type(weight) is float
    if plain and type(reduction) is str and not torch.compiler.is_compiling():
        sides = (student.dtype, student.device, student.layout, teacher.dtype, teacher.device, teacher.layout)
        key = (p, reduction, eps, resolve(backend), teacher.requires_grad, *sides)
        chosen = _approved.get(key)
        if chosen and student.shape == teacher.shape and 2 <= student.dim() <= MAX_DIMS:
            return chosen
    check_options(p=p, reduction=reduction, eps=eps, weight=weight)
    check_factors(student, teacher, weight)
    chosen = choose(backend, student, teacher)
    if key is not None:
        _approved[key] = chosen
    return chosen


def needs_torch_operators(*factors: Tensor) -> str:
    """Why only torch's own operators will do: somebody watches them, or a factor's numbers do not lie in its memory."""
    if torch.compiler.is_compiling():
        return ""
    if torch._C._are_functorch_transforms_active():
        return "inside a torch.func transform"
    if torch.autograd.forward_ad._current_level >= 0:
        return "under forward-mode differentiation"
    if torch._C._len_torch_dispatch_stack() > 0 or torch._C._get_tracing_state() is not None:
        return "under a tracer or a dispatch mode"
    for factor in factors:
        if type(factor) not in (Tensor, nn.Parameter) and _intercepts(type(factor)):
            return f"on a {type(factor).__name__}"
    return ""


def _intercepts(kind: type[Tensor]) -> bool:
    """Whether a subclass of tensors computes torch's operators itself, as wrappers and fake tensors do."""
    return kind.__torch_dispatch__ is not Tensor.__torch_dispatch__


def _run_kernels(student: Tensor, teacher: Tensor, options: Options, chosen: str) -> Tensor:
    if torch.compiler.is_compiling():
        return ft_loss_compiled.ft_loss(student, teacher, options, chosen)
    backend = BACKENDS[chosen]
    assert isinstance(backend, KernelBackend)
    student, teacher = plain(student), plain(teacher)
    if torch.is_grad_enabled() and (student.requires_grad or teacher.requires_grad):
        if student.is_inference():
            raise RuntimeError(
                "student_factor was made under torch.inference_mode and teacher_factor requires a gradient, which "
                "cannot keep it for backward; pass student_factor.clone()."
            )
        return FTLossFunction.apply(student, teacher, options, backend)
    return backend.forward(student, teacher, options)[0]


class FTLossFunction(torch.autograd.Function):
    """Saves the factors and O(N) scalars, and the student's gradient where the backend had better write it."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, options: Options, backend: KernelBackend) -> Tensor:
        ctx.options, ctx.backend = options, backend
        needs_student, needs_teacher = ctx.needs_input_grad[:2]
        written = None
        if needs_student and not needs_teacher:
            written = backend.forward_with_gradient(student, teacher, options)
        ctx.holds_gradient = written is not None
        if written is not None:
            loss, statistics, gradient, ctx.written_for = written
        else:
            loss, statistics = backend.forward(student, teacher, options)
        # A tensor made under inference_mode cannot be saved, and has no version that saving would guard.
        ctx.inference_teacher = teacher if teacher.is_inference() else None
        weights = (options.weight,) if isinstance(options.weight, Tensor) else ()
        teachers = () if teacher.is_inference() else (teacher,)
        save(ctx, student, statistics, *weights, *teachers, *((gradient,) if ctx.holds_gradient else ()))
        return loss

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        differentiable = torch.is_grad_enabled()
        batched = torch._C._functorch.is_batchedtensor(upstream) or torch._C._functorch.is_legacy_batchedtensor(
            upstream
        )
        reads_memory = not (differentiable or batched)
        upstream = plain(upstream) if reads_memory else upstream
        if ctx.holds_gradient and reads_memory and upstream.item() == ctx.written_for:
            (gradient,) = saved(ctx, last=1)
            # The graph may be run again, and whoever receives this may write to it.
            runs_again = torch._C._autograd._get_current_graph_task_keep_graph()
            return gradient.clone() if runs_again else gradient, None, None, None
        student, statistics, *rest = saved(ctx)[: -1 if ctx.holds_gradient else None]
        teacher = rest.pop() if ctx.inference_teacher is None else ctx.inference_teacher
        options = ctx.options._replace(weight=rest[0]) if rest else ctx.options
        needed = ctx.needs_input_grad[:2]
        if not reads_memory:
            with torch.enable_grad():
                return (*_differentiable_backward(student, teacher, upstream, options, needed), None, None)
        gradients = ctx.backend.backward(student, teacher, statistics, upstream, options, needed)
        return (*gradients, None, None)


def _differentiable_backward(
    student: Tensor, teacher: Tensor, upstream: Tensor, options: Options, needed: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Under create_graph the gradient is taken through the reference, which can be differentiated again."""
    inputs = [factor for factor, need in zip((student, teacher), needed, strict=True) if need]
    loss = reference.ft_loss(student, teacher, **options._asdict())
    gradients = iter(torch.autograd.grad(loss, inputs, upstream, create_graph=True))
    return (next(gradients) if needed[0] else None), (next(gradients) if needed[1] else None)
