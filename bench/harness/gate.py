"""The correctness gate: a candidate that is wrong gets no figure."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench.peers import OFFICIAL, Formula, Loss

LARGEST_FLOAT16_UPSTREAM = 2.0**15


class Limits(NamedTuple):
    """The largest relative errors that pass."""

    loss: float
    scale: float
    gradient: float


@dataclass(frozen=True)
class Gate:
    """A candidate against the float64 reference; every error is relative.

    Attributes:
        loss_error: of the loss.
        scale_error: of the gradient's length along the reference gradient: a gradient that is 0.1 % too long has 0.001,
            however coarse its dtype.
        gradient_error: of the gradient in the L2 norm.
        reason: empty where ``passed``, else what is wrong in one sentence.
    """

    passed: bool
    loss_error: float
    scale_error: float
    gradient_error: float
    reason: str = ""


def limits(factor_dtype: torch.dtype, *, rounds_throughout: bool) -> Limits:
    """The limits for factors of a dtype.

    ``rounds_throughout`` is for formulas that round every intermediate result to 16 bits; ftfast computes in float32
    and rounds its gradient once.
    """
    eps = torch.finfo(factor_dtype).eps
    if factor_dtype == torch.float64:
        return Limits(loss=1e-12, scale=1e-12, gradient=1e-10)
    if factor_dtype == torch.float32:
        return Limits(loss=1e-5, scale=1e-4, gradient=5e-4)
    if rounds_throughout:
        return Limits(loss=4 * eps, scale=4 * eps, gradient=16 * eps)
    return Limits(loss=1e-5, scale=5e-4, gradient=eps)


@dataclass(frozen=True)
class Errors:
    """Several results against float64: relative errors by what they are of, None where they are not finite.

    Attributes:
        reason: empty where ``passed``, else what is wrong in one sentence.
    """

    passed: bool
    errors: dict[str, float | None]
    reason: str = ""


def relative_errors(name: str, found: Tensor, expected: Tensor) -> dict[str, float]:
    """The relative L2 error and, but of a single number, that of the length along ``expected``.

    Rounding leaves the latter small in every dtype.
    """
    found, expected = found.detach().double().flatten(), expected.detach().double().flatten()
    square = expected @ expected
    errors = {name: ((found - expected).norm() / square.sqrt()).item()}
    if expected.numel() > 1:
        errors[length_of(name)] = abs((found @ expected / square).item() - 1)
    return errors


def length_of(name: str) -> str:
    """What :func:`relative_errors` calls the error of the length."""
    return f"length of the {name}"


def within(errors: dict[str, float], limits: dict[str, float]) -> Errors:
    """Whether every error keeps to its limit."""
    # Written so that a nan is over the limit.
    wrong = [
        f"the {name} is off by {error:.1e} (limit {limits[name]:.1e})"
        for name, error in errors.items()
        if not error <= limits[name]
    ]
    finite = {name: error if math.isfinite(error) else None for name, error in errors.items()}
    return Errors(not wrong, finite, "; ".join(wrong))


# The last one is judged, as the last ones are timed: a loss may have learnt the upstream gradient from those before.
STEPS = 3


class Judge:
    """Holds the float64 loss and gradient of one pair of factors and one formula under a random upstream gradient.

    Elements where the reference cannot tell the sign of ``a - b`` at the precision of the candidate are left out of
    the gradient's comparison: there either sign is right.
    """

    def __init__(self, student_factor: Tensor, teacher_factor: Tensor, seed: int, formula: Formula = OFFICIAL) -> None:
        generator = torch.Generator().manual_seed(seed)
        # Of the size N*D, which brings the mean form's gradient to where every dtype holds it.
        self._upstream = student_factor.numel() * (0.5 + torch.rand((), generator=generator).item())
        student = student_factor.detach().double().requires_grad_()
        teacher = teacher_factor.detach().double()
        self._loss = formula.loss(student, teacher)
        (self._gradient,) = torch.autograd.grad(self._loss * self._upstream, student)
        with torch.no_grad():
            student_direction, teacher_direction = formula.directions(student), formula.directions(teacher)
            span = student_direction.abs() + teacher_direction.abs()
            margin = ((student_direction - teacher_direction).abs() / span).nan_to_num()
        self._margin = margin.expand(student.shape)

    def __call__(
        self, loss: Loss, student_factor: Tensor, teacher_factor: Tensor, *, rounds_throughout: bool = False
    ) -> Gate:
        """Judge ``loss`` on the factors that this judge was built from, in any layout."""
        dtype = student_factor.dtype
        student = student_factor.detach().clone().requires_grad_()
        for _ in range(STEPS):
            student.grad = None
            value = loss(student, teacher_factor)
            # A loss of 16 bits takes an upstream gradient of 16 bits.
            upstream = min(self._upstream, LARGEST_FLOAT16_UPSTREAM) if value.dtype == torch.float16 else self._upstream
            value.backward(torch.tensor(upstream, dtype=value.dtype, device=value.device))
        if student.grad is None:
            return Gate(False, 0.0, 1.0, 1.0, "it gives the student factor no gradient")
        precision = dtype if rounds_throughout else max(dtype, torch.float32, key=lambda d: torch.finfo(d).bits)
        decided = self._margin > 8 * torch.finfo(precision).eps
        expected = self._gradient[decided] * (upstream / self._upstream)
        found = student.grad.double()[decided]
        loss_error = (value.detach().double() / self._loss.detach() - 1).abs().item()
        scale_error = (found @ expected / (expected @ expected) - 1).abs().item()
        gradient_error = ((found - expected).norm() / expected.norm()).item()
        allowed = limits(dtype, rounds_throughout=rounds_throughout)
        errors = {
            "loss": (loss_error, allowed.loss),
            "gradient's scale": (scale_error, allowed.scale),
            "gradient": (gradient_error, allowed.gradient),
        }
        # Written so that a nan is over the limit.
        wrong = [
            f"the {name} is off by {error:.1e} (limit {limit:.1e})"
            for name, (error, limit) in errors.items()
            if not error <= limit
        ]
        return Gate(not wrong, loss_error, scale_error, gradient_error, "; ".join(wrong))


FORWARD = "forward"


BACKWARD = "backward"


FORWARD_BACKWARD = "forward+backward"


def nothing() -> None:
    """The preparation of a step that needs none."""


@dataclass(frozen=True)
class Candidate:
    """One thing to time.

    Attributes:
        name: as tables show it.
        work: what a step does, ``"forward"``, ``"backward"`` of a forward in ``prepare``, or ``"forward+backward"``.
        step: on the clock.
        prepare: before every step, off the clock.
        least_bytes: the fewest bytes of memory traffic that the step's result needs; GB/s are counted from these.
        gate: judges the candidate, or None where nothing is computed that could be wrong.
        details: further fields of its record row.
    """

    name: str
    work: str
    step: Callable[[], object]
    prepare: Callable[[], object] = nothing
    least_bytes: int | None = None
    gate: Callable[[], Gate | Errors] | None = None
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Group:
    """Candidates that are compared with each other in one table; built when their turn comes, for memory's sake."""

    bench: str
    name: str
    details: Mapping[str, Any]
    build: Callable[[], list[Candidate]]
