"""The formulas that ftfast's loss is measured against, as their users' code computes them."""

from collections.abc import Callable
from typing import NamedTuple

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
