"""What ftfast is measured against: the official formula, torch.compile of it, and the yardsticks."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Loss = Callable[[Tensor, Tensor], Tensor]

EAGER = "eager"
COMPILED = "torch.compile"
YARDSTICK = "yardstick F"
COPY = "copy"


def official_formula(student_factor: Tensor, teacher_factor: Tensor) -> Tensor:
    """The loss of the official code (Jangho-Kim/Factor-Transfer-pytorch, train.py).

    ``reshape`` stands for its ``view``, which raises on channels_last factors.
    """
    samples = student_factor.shape[0]
    student_direction = F.normalize(student_factor.reshape(samples, -1))
    teacher_direction = F.normalize(teacher_factor.reshape(samples, -1))
    return nn.functional.l1_loss(student_direction, teacher_direction)


def compiled_formula() -> Loss:
    """torch.compile of :func:`official_formula`, compiled for each shape."""
    # Without the reset, earlier shapes count towards the recompile limit, past which torch runs eagerly.
    torch.compiler.reset()
    return torch.compile(official_formula, dynamic=False)


# By the name that --peers takes; each is built anew for a shape.
PEERS: dict[str, tuple[str, Callable[[], Loss]]] = {
    "eager": (EAGER, lambda: official_formula),
    "compile": (COMPILED, compiled_formula),
}


class YardstickF(torch.autograd.Function):
    """Two factors read and a gradient written by one ``torch.add``: what autograd and memory cost without the loss."""

    @staticmethod
    def forward(ctx: Any, student_factor: Tensor, teacher_factor: Tensor) -> Tensor:
        gradient = torch.empty_like(student_factor)
        torch.add(student_factor, teacher_factor, out=gradient)
        ctx.gradient = gradient
        return student_factor.new_zeros((), dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None]:
        # A second reference would make autograd copy the gradient instead of keeping it.
        gradient, ctx.gradient = ctx.gradient, None
        return gradient, None


def yardstick(student_factor: Tensor, teacher_factor: Tensor) -> Tensor:
    """:class:`YardstickF` with the signature of a loss."""
    return YardstickF.apply(student_factor, teacher_factor)
