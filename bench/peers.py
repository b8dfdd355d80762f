"""What ftfast is measured against: other implementations by name, and the yardsticks."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import torch
from torch import Tensor

from bench.peer_losses import (
    ATTENTION,
    OFFICIAL,
    Formula,
    Loss,
    autocast_formula,
    mmrazor_formula,
    official_formula,
    repdistiller_formula,
    torchdistill_loss,
)

EAGER = "eager"
COMPILED = "torch.compile"
TUNED = "torch.compile, max-autotune"
YARDSTICK = "yardstick F"
COPY = "copy"


def compiled_formula() -> Loss:
    """torch.compile of :func:`official_formula`, compiled for each shape."""
    # Without the reset, earlier shapes count towards the recompile limit, past which torch runs eagerly.
    torch.compiler.reset()
    return torch.compile(official_formula, dynamic=False)


def tuned_formula() -> Loss:
    """:func:`compiled_formula`, tuned for as long as the compiler likes; CUDA graphs are measured apart."""
    torch.compiler.reset()
    return torch.compile(official_formula, dynamic=False, mode="max-autotune-no-cudagraphs")


@dataclass(frozen=True)
class Peer:
    """Another implementation of the loss.

    Attributes:
        title: as tables show it.
        build: makes the loss, anew for each shape; raises ``NotInstalledError`` where its package is missing.
        formula: what it computes; another than the official one is judged against its own float64 result.
        package: the distribution whose version belongs into the record.
        only_16_bit: it is the same as another peer on wider factors.
    """

    title: str
    build: Callable[[], Loss]
    formula: Formula = OFFICIAL
    package: str = ""
    only_16_bit: bool = False

    def takes(self, dtype: torch.dtype) -> bool:
        """Whether it is measured on factors of ``dtype``."""
        return dtype.itemsize < 4 or not self.only_16_bit

    def details(self) -> dict[str, Any]:
        """Fields of its record rows."""
        found: dict[str, Any] = {}
        if self.formula is not OFFICIAL:
            found["other_formula"] = True
        if self.package:
            try:
                found["package"] = f"{self.package} {metadata.version(self.package)}"
            except metadata.PackageNotFoundError:
                found["package"] = self.package
        return found


# By the name that --peers takes.
PEERS: dict[str, Peer] = {
    "eager": Peer(EAGER, lambda: official_formula),
    "autocast": Peer("eager, autocast", lambda: autocast_formula, only_16_bit=True),
    "compile": Peer(COMPILED, compiled_formula),
    "compile-max-autotune": Peer(TUNED, tuned_formula),
    "torchdistill": Peer("torchdistill", torchdistill_loss, package="torchdistill"),
    "repdistiller": Peer("RepDistiller", lambda: repdistiller_formula, formula=ATTENTION),
    "mmrazor": Peer("mmrazor", lambda: mmrazor_formula),
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
