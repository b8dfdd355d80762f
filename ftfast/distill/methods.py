"""The distillation methods: which terms a student's loss has."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from ftfast.head import FactorTransfer

Terms = dict[str, Tensor]


class Outputs(NamedTuple):
    """What a network says about a batch: logits ``[N, classes]`` and last feature map ``[N, C, H, W]``."""

    logits: Tensor
    features: Tensor


@dataclass(frozen=True)
class Weights:
    """The weights of a student's loss; None where the method has no such weight.

    Attributes:
        beta: of the factor transfer loss in its mean form.
        alpha: of the soft labels against the true ones, 0 to 1.
        temperature: of the soft labels.
    """

    beta: float | None = None
    alpha: float | None = None
    temperature: float = 4.0


@dataclass(frozen=True)
class Method:
    """A method's title, its source, which weights it has, and its loss as named terms that are summed."""

    title: str
    source: str
    weights: tuple[str, ...]
    terms: Callable[[Outputs, Outputs | None, Tensor, FactorTransfer | None, Weights], Terms]

    @property
    def uses_teacher(self) -> bool:
        return bool(self.weights)

    @property
    def uses_factors(self) -> bool:
        return "beta" in self.weights


def _cross_entropy(student: Outputs, labels: Tensor) -> Tensor:
    return F.cross_entropy(student.logits.float(), labels)


def _soft_labels(student: Outputs, teacher: Outputs | None, temperature: float) -> Tensor:
    """``T^2 * KL(teacher, student)`` at temperature T; T^2 keeps its gradient at the size of the labels' one."""
    assert teacher is not None
    student_log = F.log_softmax(student.logits.float() / temperature, dim=1)
    teacher_log = F.log_softmax(teacher.logits.float() / temperature, dim=1)
    return temperature**2 * F.kl_div(student_log, teacher_log, log_target=True, reduction="batchmean")


def _factors(student: Outputs, teacher: Outputs | None, head: FactorTransfer | None) -> Tensor:
    """``beta * L_FT``: the head carries beta as its ``weight``."""
    assert teacher is not None
    assert head is not None
    return head(student.features, teacher.features)


def _none(
    student: Outputs, teacher: Outputs | None, labels: Tensor, head: FactorTransfer | None, weights: Weights
) -> Terms:
    return {"labels": _cross_entropy(student, labels)}


def _ft(
    student: Outputs, teacher: Outputs | None, labels: Tensor, head: FactorTransfer | None, weights: Weights
) -> Terms:
    return {"labels": _cross_entropy(student, labels), "factors": _factors(student, teacher, head)}


def _kd(
    student: Outputs, teacher: Outputs | None, labels: Tensor, head: FactorTransfer | None, weights: Weights
) -> Terms:
    assert weights.alpha is not None
    return {
        "labels": (1 - weights.alpha) * _cross_entropy(student, labels),
        "soft_labels": weights.alpha * _soft_labels(student, teacher, weights.temperature),
    }


def _ft_kd(
    student: Outputs, teacher: Outputs | None, labels: Tensor, head: FactorTransfer | None, weights: Weights
) -> Terms:
    return {**_kd(student, teacher, labels, head, weights), "factors": _factors(student, teacher, head)}


_FT_SOURCE = "Kim, Park and Kwak, Paraphrasing Complex Network, NeurIPS 2018, section 3"
_KD_SOURCE = "Hinton, Vinyals and Dean, Distilling the Knowledge in a Neural Network, 2015, section 2"

METHODS = {
    "none": Method("labels only", "", (), _none),
    "ft": Method("Factor Transfer", _FT_SOURCE, ("beta",), _ft),
    "kd": Method("soft labels", _KD_SOURCE, ("alpha",), _kd),
    "ft+kd": Method("Factor Transfer and soft labels", f"{_FT_SOURCE}; {_KD_SOURCE}", ("beta", "alpha"), _ft_kd),
}
