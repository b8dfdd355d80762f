"""The part of ``ftfast check`` that holds the loss to float64: every dtype, p and layout."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from ftfast import reference
from ftfast.arguments import Backend
from ftfast.backends import KernelBackend
from ftfast.loss import ft_loss

# Relative: of the loss, and in L2 of a gradient. A gradient is rounded once to its dtype, so its bound is that of a
# rounding; the loss never is, and its bound is that of a float32 or float64 sum.
LOSS_BOUNDS = {torch.float64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 1e-6, torch.float16: 1e-6}
GRADIENT_BOUNDS = {torch.float64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}
LAYOUTS = ("nchw", "channels_last", "unlike strides", "slice")
# Where numbers leave a dtype's range, or memory is not the value; each with its eps.
CONDITIONS = {
    "zero rows": 1e-12,
    "tiny eps": 1e-30,
    "unlike sizes": 1e-30,
    "norm overflows": 1e-12,
    "negated views": 1e-12,
}
SHAPE = (6, 24, 7, 7)
LONG_SHAPE = (2, 352, 7, 7)  # D = 17248: past what the Triton kernels keep in registers
STORED = (torch.int8, torch.float8_e4m3fn)


@dataclass(frozen=True)
class Outcome:
    """The errors of one kernel on one case, relative to float64."""

    backend: str
    device: str
    dtype: str
    teacher: str
    p: int
    layout: str
    loss_error: float
    student_error: float
    teacher_error: float | None
    share: float  # of what is allowed, the largest of the errors
    ok: bool


def check_backend(backend: KernelBackend, device: torch.device) -> Iterator[Outcome]:
    """Every dtype, p and layout of one backend on one device, with a trained and with a frozen teacher's side."""
    cases: list[dict[str, Any]] = []
    for dtype, p in itertools.product(GRADIENT_BOUNDS, (1, 2)):
        cases += [{"dtype": dtype, "p": p, "layout": layout} for layout in LAYOUTS]
        cases += [{"dtype": dtype, "p": p, "layout": layout, "frozen": True} for layout in ("nchw", "unlike strides")]
        cases += [{"dtype": dtype, "p": p, "layout": "nchw", "frozen": True, "stored": stored} for stored in STORED]
        cases.append({"dtype": dtype, "p": p, "layout": "nchw", "frozen": True, "shape": LONG_SHAPE})
    for condition, p in itertools.product(CONDITIONS, (1, 2)):
        cases.append({"dtype": torch.float32, "p": p, "layout": "nchw", "frozen": True, "condition": condition})
    cases += [
        {**case, "stored": torch.int8} for case in cases if case.get("condition") in ("tiny eps", "norm overflows")
    ]
    for case in cases:
        if backend.supports(device, case["dtype"], case.get("stored", case["dtype"])).ok:
            yield check_case(backend, device, **case)


def check_case(
    backend: KernelBackend,
    device: torch.device,
    dtype: torch.dtype,
    p: int,
    layout: str,
    *,
    frozen: bool = False,
    stored: torch.dtype | None = None,
    shape: tuple[int, int, int, int] = SHAPE,
    condition: str = "",
) -> Outcome:
    """Loss and gradients, under an upstream gradient that brings mean-form gradients to O(1).

    Args:
        condition: one of CONDITIONS, or "" for ordinary factors.
        frozen: the teacher's factor requires no gradient, as in training.
        stored: the dtype in which a frozen teacher's factor is kept, where it is not ``dtype``.
    """
    student, teacher = (factor.to(device) for factor in make_factors(dtype, layout, shape))
    if stored is not None:
        teacher = (teacher * 40).clamp(-120, 120).to(stored)
    if condition in ("zero rows", "tiny eps"):
        student[1] = 0
    elif condition == "unlike sizes":
        student, teacher = student * 1e15, teacher * 1e-15
    elif condition == "norm overflows":
        student[1] *= 1e25
    exact_student, exact_teacher = student.double(), teacher.double()
    if condition == "negated views":
        student, teacher = torch._neg_view(-student), torch._neg_view(-teacher)
    eps = CONDITIONS.get(condition, 1e-12)
    # One upstream gradient that is not expected, and then another one until it is.
    upstreams = (2, 1, 1, 1) if frozen and backend.expects_upstream else (1,)
    results = [_loss_and_gradients(student, teacher, p, backend.name, frozen, eps, times) for times in upstreams]
    if condition == "norm overflows":  # as in torch's own float32, whose quotient by an infinite norm is 0
        exact_student[1] = 0
    exact_loss, exact_gradients = _loss_and_gradients(exact_student, exact_teacher, p, "reference", frozen, eps, 1)
    if condition == "norm overflows":
        exact_gradients[0][1] = 0
    loss_error = max(relative_error(loss, exact_loss) for loss, _ in results)
    errors = [0.0] * len(exact_gradients)
    for times, (_, gradients) in zip(upstreams, results, strict=True):
        of_step = [relative_error(got, exact * times) for got, exact in zip(gradients, exact_gradients, strict=True)]
        errors = [max(pair) for pair in zip(errors, of_step, strict=True)]
    share = max(loss_error / LOSS_BOUNDS[dtype], max(errors) / GRADIENT_BOUNDS[dtype])
    teacher_name = "frozen " * frozen + _name(stored or dtype)
    if shape != SHAPE:
        layout = f"{layout}, long"
    layout = condition or layout
    teacher_error = None if frozen else errors[1]
    where = backend.place(device)
    names = backend.name, where, _name(dtype), teacher_name
    return Outcome(*names, p, layout, loss_error, errors[0], teacher_error, share, share <= 1)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def make_factors(dtype: torch.dtype, layout: str, shape: tuple[int, int, int, int] = SHAPE) -> tuple[Tensor, Tensor]:
    """A student's and a teacher's random factor ``[N, C, H, W]`` in one of LAYOUTS."""
    generator = torch.Generator().manual_seed(0)
    samples, channels, height, width = shape
    wide = (samples, channels + 3, height, width + 2)
    student, teacher = (torch.randn(wide, generator=generator).to(dtype) for _ in range(2))
    student, teacher = student[:, 2 : 2 + channels, :, 1 : 1 + width], teacher[:, 1 : 1 + channels, :, :width]
    if layout == "slice":
        return student, teacher
    student_format = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    teacher_format = torch.contiguous_format if layout == "nchw" else torch.channels_last
    return student.contiguous(memory_format=student_format), teacher.contiguous(memory_format=teacher_format)


def relative_error(got: Tensor, exact: Tensor) -> float:
    """``|got - exact| / |exact|`` in float64; 0 where both are zero; NaN counts as infinite."""
    error, size = (got.double() - exact).norm().item(), exact.norm().item()
    if error == 0:
        return 0.0
    return error / size if size > 0 and error == error else float("inf")


def _loss_and_gradients(
    student: Tensor, teacher: Tensor, p: int, backend: str, frozen: bool, eps: float, times: int
) -> tuple[Tensor, tuple[Tensor, ...]]:
    student = student.detach().requires_grad_()
    inputs = [student] if frozen else [student, teacher := teacher.detach().requires_grad_()]
    if backend == "reference":
        loss = reference.ft_loss(student, teacher, p=p, eps=eps)
    else:
        loss = ft_loss(student, teacher, p=p, eps=eps, backend=cast(Backend, backend))
    return loss, torch.autograd.grad(loss, inputs, torch.full_like(loss, times * student.numel()))


_WIDTHS = (9, 13, 10, 21, 3, 16)


def _cells(*cells: object) -> str:
    return "".join(f"{cell:<{width}}" for cell, width in zip(cells, _WIDTHS, strict=True))


def head() -> str:
    """What stands above the lines of :func:`line`."""
    names = _cells("backend", "on", "student", "teacher", "p", "layout")
    return f"{names}{'loss':>9}{'d student':>11}{'d teacher':>11}"


def line(it: Outcome) -> str:
    """One case."""
    teacher_error = f"{it.teacher_error:>11.1e}" if it.teacher_error is not None else " " * 11
    errors = f"{it.loss_error:>9.1e}{it.student_error:>11.1e}{teacher_error}"
    cells = _cells(it.backend, it.device, it.dtype, it.teacher, it.p, it.layout)
    return f"{cells}{errors}{'' if it.ok else '  WRONG'}"
