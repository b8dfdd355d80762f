"""``ftfast check``: every kernel that can run here against the float64 reference."""

import argparse
import itertools
import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from ftfast import reference
from ftfast.dispatch import interpreting, supports
from ftfast.loss import ft_loss

# Relative: of the loss, and in L2 of a gradient. A gradient is rounded once to its dtype, so its bound is that of a
# rounding; the loss never is, and its bound is that of a float32 or float64 sum.
LOSS_BOUNDS = {torch.float64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 1e-6, torch.float16: 1e-6}
GRADIENT_BOUNDS = {torch.float64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}
LAYOUTS = ("nchw", "channels_last", "unlike strides", "slice")
SHAPE = (6, 24, 7, 7)


@dataclass(frozen=True)
class Outcome:
    """The errors of one kernel on one case, relative to float64."""

    backend: str
    device: str
    dtype: str
    p: int
    layout: str
    loss_error: float
    student_error: float
    teacher_error: float
    ok: bool


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--backend", choices=("native", "triton"), help="check this backend only")


def run(args: argparse.Namespace) -> int:
    outcomes: list[Outcome] = []
    skipped: list[str] = []
    for backend in [args.backend] if args.backend else ["native", "triton"]:
        device = torch.device("cuda" if backend == "triton" and torch.cuda.is_available() else "cpu")
        support = supports(backend, device, torch.float32, torch.float32)
        if support.ok:
            outcomes += check_backend(backend, device)
        elif backend == "triton" and not interpreting() and "not installed" not in support.reason:
            outcomes += _check_interpreted()
        else:
            skipped.append(f"{backend} cannot run here: {support.reason}")
    wrong = [outcome for outcome in outcomes if not outcome.ok]
    if args.json:
        print(json.dumps({"outcomes": [asdict(outcome) for outcome in outcomes], "skipped": skipped}, indent=1))
    else:
        _print_table(outcomes)
        for line in skipped:
            print(line)
        print(f"{len(outcomes) - len(wrong)} of {len(outcomes)} kernels agree with the float64 reference.")
    return 1 if wrong else 0


def check_backend(backend: str, device: torch.device) -> list[Outcome]:
    """Every dtype, p and layout of one backend on one device."""
    cases = itertools.product(GRADIENT_BOUNDS, (1, 2), LAYOUTS)
    return [check_case(backend, device, dtype, p, layout) for dtype, p, layout in cases]


def check_case(backend: str, device: torch.device, dtype: torch.dtype, p: int, layout: str) -> Outcome:
    """Loss and both gradients, under an upstream gradient that brings mean-form gradients to O(1)."""
    student, teacher = (factor.to(device) for factor in make_factors(dtype, layout))
    loss, gradients = _loss_and_gradients(student, teacher, p, backend)
    exact_loss, exact_gradients = _loss_and_gradients(student.double(), teacher.double(), p, "reference")
    loss_error = relative_error(loss, exact_loss)
    student_error = relative_error(gradients[0], exact_gradients[0])
    teacher_error = relative_error(gradients[1], exact_gradients[1])
    ok = loss_error <= LOSS_BOUNDS[dtype] and max(student_error, teacher_error) <= GRADIENT_BOUNDS[dtype]
    where = "interpreter" if backend == "triton" and device.type == "cpu" else device.type
    name = str(dtype).removeprefix("torch.")
    return Outcome(backend, where, name, p, layout, loss_error, student_error, teacher_error, ok)


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


def _loss_and_gradients(student: Tensor, teacher: Tensor, p: int, backend: str) -> tuple[Tensor, tuple[Tensor, ...]]:
    student, teacher = student.detach().requires_grad_(), teacher.detach().requires_grad_()
    if backend == "reference":
        loss = reference.ft_loss(student, teacher, p=p)
    else:
        loss = ft_loss(student, teacher, p=p, backend=backend)
    upstream = torch.full_like(loss, student.numel())
    return loss, torch.autograd.grad(loss, (student, teacher), upstream)


def _check_interpreted() -> list[Outcome]:
    """Triton reads TRITON_INTERPRET when a kernel is decorated, so its interpreter needs a process of its own."""
    command = [sys.executable, "-m", "ftfast", "check", "--backend", "triton", "--json"]
    done = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    if done.returncode not in (0, 1) or not done.stdout:
        raise RuntimeError(f"the check of the Triton kernels in the interpreter failed: {done.stderr.strip()[-2000:]}")
    return [Outcome(**outcome) for outcome in json.loads(done.stdout)["outcomes"]]


def _print_table(outcomes: list[Outcome]) -> None:
    head = f"{'backend':<9}{'on':<13}{'dtype':<10}{'p':<3}{'layout':<16}{'loss':>9}{'d student':>11}{'d teacher':>11}"
    print(head)
    for it in outcomes:
        errors = f"{it.loss_error:>9.1e}{it.student_error:>11.1e}{it.teacher_error:>11.1e}"
        verdict = "" if it.ok else "  WRONG"
        print(f"{it.backend:<9}{it.device:<13}{it.dtype:<10}{it.p:<3}{it.layout:<16}{errors}{verdict}")
