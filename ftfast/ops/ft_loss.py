"""The loss as autograd sees it: one check of every argument, one autograd.Function, one pair of library operators.

Eager calls go through the Function; compiled code goes through the operators ``ftfast::ft_loss_forward`` and
``ftfast::ft_loss_backward``, whose boundary costs more than a small kernel.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ftfast import reference
from ftfast.dispatch import FACTOR_DTYPES, choose, resolve
from ftfast.ops import ft_loss_native as native
from ftfast.reference import QUANTISED_DTYPES, compute_dtype

REDUCTIONS = ("mean", "batchmean", "sum", "none")
MAX_DIMS = 9


class Options(NamedTuple):
    """What a call asks for besides its tensors; ``weight`` is a float, or a 0-d tensor without gradient."""

    p: int
    reduction: str
    eps: float
    weight: float | Tensor


def check_options(*, p: int, reduction: str, eps: float, weight: float | Tensor, backend: str) -> None:
    """Raises ValueError or TypeError, in one sentence, on an option that no backend takes."""
    if isinstance(p, bool) or p not in (1, 2):
        raise ValueError(f"p is {p!r}; it takes 1 (the official code) or 2.")
    if reduction not in REDUCTIONS:
        raise ValueError(
            f'reduction is {reduction!r}; it takes "mean" (divides by N*D for p=1 and by N for p=2), "batchmean" '
            '(divides by N), "sum" or "none".'
        )
    if not isinstance(eps, (int, float)) or not eps >= 0:
        raise ValueError(f"eps is {eps!r}; it takes a number of at least 0, 1e-12 by default.")
    if isinstance(weight, Tensor):
        if weight.dim() != 0:
            raise ValueError(f"weight has shape {tuple(weight.shape)}; it takes a float or a 0-d tensor.")
    elif not isinstance(weight, (int, float)):
        raise TypeError(f"weight is a {type(weight).__name__}; it takes a float or a 0-d tensor.")
    resolve(backend)


def check_factors(student_factor: Tensor, teacher_factor: Tensor, weight: float | Tensor) -> None:
    """Raises in one sentence on factors that cannot be compared."""
    for name, factor in (("student_factor", student_factor), ("teacher_factor", teacher_factor)):
        if not isinstance(factor, Tensor):
            raise TypeError(f"{name} is a {type(factor).__name__}; it takes a tensor.")
        if type(factor).__name__ == "DTensor":
            raise TypeError(f"{name} is a DTensor; the loss takes local tensors, so pass {name}.to_local().")
        if factor.layout != torch.strided:
            raise TypeError(f"{name} has layout {factor.layout}; it takes a dense tensor, so pass {name}.to_dense().")
    if student_factor.dtype not in FACTOR_DTYPES:
        raise TypeError(
            f"student_factor has dtype {student_factor.dtype}; it takes float64, float32, bfloat16 or float16."
        )
    if teacher_factor.dtype not in FACTOR_DTYPES + QUANTISED_DTYPES:
        raise TypeError(
            f"teacher_factor has dtype {teacher_factor.dtype}; it takes float64, float32, bfloat16, float16, int8 or "
            "float8_e4m3fn."
        )
    if student_factor.shape != teacher_factor.shape:
        raise ValueError(
            f"student_factor has shape {tuple(student_factor.shape)} and teacher_factor "
            f"{tuple(teacher_factor.shape)}; the translator must make factors of the paraphraser's shape."
        )
    if not 2 <= student_factor.dim() <= MAX_DIMS:
        raise ValueError(
            f"student_factor has shape {tuple(student_factor.shape)}; it takes [N, ...] of 2 to {MAX_DIMS} dimensions."
        )
    if student_factor.device != teacher_factor.device:
        raise ValueError(
            f"student_factor is on {student_factor.device} and teacher_factor on {teacher_factor.device}; "
            "move one of them."
        )
    if isinstance(weight, Tensor) and weight.device.type != "cpu" and weight.device != student_factor.device:
        raise ValueError(
            f"weight is on {weight.device} and the factors on {student_factor.device}; keep it there or on the CPU."
        )


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
        # The weight stays outside the operator: as an argument of it, every new value would be a recompilation.
        p, reduction, eps, weight = options
        return torch.ops.ftfast.ft_loss_forward(student, teacher, p, reduction, eps, backend)[0] * weight
    if torch.is_grad_enabled() and (student.requires_grad or teacher.requires_grad):
        return FTLossFunction.apply(student, teacher, options, backend)
    return _forward(student, teacher, options, backend)[0]


def _forward(student: Tensor, teacher: Tensor, options: Options, backend: str) -> tuple[Tensor, Tensor]:
    """``(loss, statistics)``: statistics ``[5, N]`` are what backward needs beside the factors."""
    if backend == "native":
        return native.ft_loss_forward(student, teacher, **options._asdict())
    from ftfast.kernels import ft_loss as triton_kernels

    return triton_kernels.ft_loss_forward(student, teacher, **options._asdict())


def _backward(
    student: Tensor,
    teacher: Tensor,
    statistics: Tensor,
    upstream: Tensor,
    options: Options,
    backend: str,
    needed: tuple[bool, bool],
) -> tuple[Tensor | None, Tensor | None]:
    given: dict[str, Any] = {"p": options.p, "reduction": options.reduction, "weight": options.weight}
    given |= {"student_gradient": needed[0], "teacher_gradient": needed[1]}
    if backend == "native":
        return native.ft_loss_backward(student, teacher, statistics, upstream, **given)
    from ftfast.kernels import ft_loss as triton_kernels

    return triton_kernels.ft_loss_backward(student, teacher, statistics, upstream, **given)


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
        loss, statistics = _forward(student, teacher, options, backend)
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
        return (*_backward(student, teacher, statistics, upstream, ctx.options, ctx.backend, needed), None, None)


def _differentiable_backward(
    student: Tensor, teacher: Tensor, upstream: Tensor, options: Options, needed: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Under create_graph the gradient is taken through the reference, which can be differentiated again."""
    inputs = [factor for factor, need in zip((student, teacher), needed, strict=True) if need]
    loss = reference.ft_loss(student, teacher, **options._asdict())
    gradients = iter(torch.autograd.grad(loss, inputs, upstream, create_graph=True))
    return (next(gradients) if needed[0] else None), (next(gradients) if needed[1] else None)


@torch.library.custom_op("ftfast::ft_loss_forward", mutates_args=())
def _forward_op(
    student: Tensor, teacher: Tensor, p: int, reduction: str, eps: float, backend: str
) -> tuple[Tensor, Tensor]:
    return _forward(student, teacher, Options(p, reduction, eps, 1.0), backend)


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
    options, needed = Options(p, reduction, 0.0, 1.0), (needs_student, needs_teacher)
    for_student, for_teacher = _backward(student, teacher, statistics, upstream, options, backend, needed)
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
