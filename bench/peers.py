"""What ftfast is measured against: other implementations by name, and the yardsticks."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ftfast import reference

Loss = Callable[[Tensor, Tensor], Tensor]


class NotInstalledError(ImportError):
    """A peer's package is missing; the message says how to get it."""


def official_formula(student_factor: Tensor, teacher_factor: Tensor) -> Tensor:
    """The loss of the official code (Jangho-Kim/Factor-Transfer-pytorch, train.py).

    ``reshape`` stands for its ``view``, which raises on channels_last factors.
    """
    samples = student_factor.shape[0]
    student_direction = F.normalize(student_factor.reshape(samples, -1))
    teacher_direction = F.normalize(teacher_factor.reshape(samples, -1))
    return nn.functional.l1_loss(student_direction, teacher_direction)


def autocast_formula(student_factor: Tensor, teacher_factor: Tensor) -> Tensor:
    """:func:`official_formula` under autocast, on factors of 16 bits as a region's convolutions leave them."""
    with torch.autocast(student_factor.device.type, student_factor.dtype):
        return official_formula(student_factor, teacher_factor)


def mmrazor_formula(student_factor: Tensor, teacher_factor: Tensor) -> Tensor:
    """The loss of open-mmlab/mmrazor (models/losses/factor_transfer_loss.py): the official one, times its weight.

    ``reshape`` stands for its ``view``, which raises on channels_last factors.
    """
    loss_weight = 1.0  # its default
    return loss_weight * official_formula(student_factor, teacher_factor)


def torchdistill_formula(student_factor: Tensor, teacher_factor: Tensor) -> Tensor:
    """What :func:`torchdistill_loss` computes, where the package is not installed: divisions without a floor."""
    student, teacher = student_factor.flatten(1), teacher_factor.flatten(1)
    return F.l1_loss(student / student.norm(dim=1)[:, None], teacher / teacher.norm(dim=1)[:, None])


def attention(factor: Tensor) -> Tensor:
    """RepDistiller's factor: ``[N, H*W]``, unit vectors of the squares' mean over channels."""
    return F.normalize(factor.pow(2).mean(1).flatten(1))


def repdistiller_formula(student_factor: Tensor, teacher_factor: Tensor) -> Tensor:
    """``FactorTransfer(p1=2, p2=1)`` of HobbitLong/RepDistiller (distiller_zoo/FT.py), of factors of one map size.

    Another loss than the paper's: it compares attention maps.
    """
    return (attention(student_factor) - attention(teacher_factor)).abs().mean()


def torchdistill_loss() -> Loss:
    """``FTLoss`` of the package torchdistill (losses/mid_level.py), given the two modules' outputs as it expects them.

    Raises:
        NotInstalledError: the package does not import.
    """
    try:
        from torchdistill.losses.mid_level import FTLoss
    except ImportError as error:
        missing = error.name or "torchdistill"
        raise NotInstalledError(f"not installed: pip install {missing.partition('.')[0]}") from None
    loss = FTLoss(p=1, reduction="mean")

    def run(student_factor: Tensor, teacher_factor: Tensor) -> Tensor:
        return loss({"translator": {"output": student_factor}}, {"paraphraser": {"output": teacher_factor}})

    return run


class Formula(NamedTuple):
    """What a loss computes, as the gate needs it.

    Attributes:
        loss: in the precision of its factors; judged against in float64.
        directions: the unit vectors whose differences' signs decide the gradient, in a shape that broadcasts to the
            factor's.
    """

    loss: Loss
    directions: Callable[[Tensor], Tensor]


def _unit_factor(factor: Tensor) -> Tensor:
    return F.normalize(factor.reshape(factor.shape[0], -1)).view(factor.shape)


def _unit_attention(factor: Tensor) -> Tensor:
    return attention(factor).view(factor.shape[0], 1, *factor.shape[2:])


OFFICIAL = Formula(reference.ft_loss, _unit_factor)


ATTENTION = Formula(repdistiller_formula, _unit_attention)


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
    "torchdistill-formula": Peer("torchdistill's formula", lambda: torchdistill_formula),
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
