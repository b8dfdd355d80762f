"""The distillation methods: which terms a student's loss has. All compare the same two feature maps."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from ftfast.distill.models.registry import Outputs
from ftfast.ops.attention import attention_difference

Terms = dict[str, Tensor]


class Stored(NamedTuple):
    """What a factor store knows of a batch in the teacher's place.

    Factors ``[N, factor_channels, H, W]``, floating, int8 or float8_e4m3fn, whose direction alone counts; and where
    they were stored, logits ``[N, classes]``.
    """

    factors: Tensor
    logits: Tensor | None = None


Taught = Outputs | Stored
"""What a student's loss compares with."""


@dataclass(frozen=True)
class Weights:
    """The weights of a student's loss; None where the method has no such weight.

    Attributes:
        beta: of the factor transfer loss in its mean form.
        attention: of the squared distance of attention maps, in its mean form.
        hint: of the squared distance of feature maps, in its mean form.
        alpha: of the soft labels against the true ones, 0 to 1.
        temperature: of the soft labels.
    """

    beta: float | None = None
    attention: float | None = None
    hint: float | None = None
    alpha: float | None = None
    temperature: float = 4.0


class Regressor(nn.Module):
    """FitNets' map from a student's features to the size of the teacher's: a 1x1 convolution that learns with it."""

    def __init__(self, student_channels: int, teacher_channels: int) -> None:
        super().__init__()
        self.projection = nn.Conv2d(student_channels, teacher_channels, 1)

    def forward(self, features: Tensor) -> Tensor:
        """``[N, student_channels, H, W]`` to ``[N, teacher_channels, H, W]``."""
        return self.projection(features)


@dataclass(frozen=True)
class Method:
    """A method's title, its source, which weights it has, and its loss as named terms that are summed.

    The fourth argument of ``terms`` is what translates between student and teacher: a ``FactorTransfer`` for ``beta``,
    a :class:`Regressor` for ``hint``, else None.
    """

    title: str
    source: str
    weights: tuple[str, ...]
    terms: Callable[[Outputs, Taught | None, Tensor, nn.Module | None, Weights], Terms]

    @property
    def uses_teacher(self) -> bool:
        return bool(self.weights)

    @property
    def uses_teacher_maps(self) -> bool:
        """Whether it needs the teacher's feature maps themselves, not factors or logits alone."""
        return bool({"attention", "hint"} & set(self.weights))

    @property
    def uses_teacher_logits(self) -> bool:
        return "alpha" in self.weights

    @property
    def uses_factors(self) -> bool:
        return "beta" in self.weights

    @property
    def uses_hints(self) -> bool:
        return "hint" in self.weights


def _labels(student: Outputs, labels: Tensor, weight: float = 1.0) -> Terms:
    return {"labels": weight * F.cross_entropy(student.logits.float(), labels)}


def _soft_labels(student: Outputs, teacher: Taught | None, labels: Tensor, weights: Weights) -> Terms:
    """``(1 - alpha) * labels + alpha * T^2 * KL(teacher, student)`` at temperature T, which T^2 keeps in proportion."""
    assert teacher is not None
    assert teacher.logits is not None
    assert weights.alpha is not None
    student_log = F.log_softmax(student.logits.float() / weights.temperature, dim=1)
    teacher_log = F.log_softmax(teacher.logits.float() / weights.temperature, dim=1)
    divergence = weights.temperature**2 * F.kl_div(student_log, teacher_log, log_target=True, reduction="batchmean")
    return {**_labels(student, labels, 1 - weights.alpha), "soft_labels": weights.alpha * divergence}


def _factors(student: Outputs, teacher: Taught | None, head: nn.Module | None) -> Terms:
    """``beta * L_FT``: the head carries beta as its ``weight``."""
    assert teacher is not None
    assert head is not None
    if isinstance(teacher, Stored):
        return {"factors": head(student.features, teacher_factor=teacher.factors)}
    return {"factors": head(student.features, teacher.features)}


def _attention(student: Outputs, teacher: Taught | None, weights: Weights) -> Terms:
    """The mean square of the difference of two unit vectors ``[N, H*W]``, the mean of squares over channels."""
    assert isinstance(teacher, Outputs)
    assert weights.attention is not None
    return {"attention": weights.attention * attention_difference(student.features, teacher.features, p=2)}


def _hints(student: Outputs, teacher: Taught | None, regressor: nn.Module | None, weights: Weights) -> Terms:
    assert isinstance(teacher, Outputs)
    assert regressor is not None
    assert weights.hint is not None
    return {"hints": weights.hint * F.mse_loss(regressor(student.features).float(), teacher.features.float())}


_FT_SOURCE = "Kim, Park and Kwak, Paraphrasing Complex Network, NeurIPS 2018, section 3"
_KD_SOURCE = "Hinton, Vinyals and Dean, Distilling the Knowledge in a Neural Network, 2015, section 2"
_AT_SOURCE = "Zagoruyko and Komodakis, Paying More Attention to Attention, ICLR 2017, section 3.1, at the last features"
_FITNET_SOURCE = "Romero et al., FitNets, ICLR 2015, section 2.2, at the last features and in one stage with the labels"

METHODS = {
    "none": Method("labels only", "", (), lambda s, t, y, guide, w: _labels(s, y)),
    "kd": Method("soft labels", _KD_SOURCE, ("alpha",), lambda s, t, y, guide, w: _soft_labels(s, t, y, w)),
    "at": Method(
        "attention transfer",
        _AT_SOURCE,
        ("attention",),
        lambda s, t, y, guide, w: {**_labels(s, y), **_attention(s, t, w)},
    ),
    "fitnet": Method(
        "hints", _FITNET_SOURCE, ("hint",), lambda s, t, y, guide, w: {**_labels(s, y), **_hints(s, t, guide, w)}
    ),
    "ft": Method(
        "Factor Transfer", _FT_SOURCE, ("beta",), lambda s, t, y, guide, w: {**_labels(s, y), **_factors(s, t, guide)}
    ),
    "ft+kd": Method(
        "Factor Transfer and soft labels",
        f"{_FT_SOURCE}; {_KD_SOURCE}",
        ("beta", "alpha"),
        lambda s, t, y, guide, w: {**_soft_labels(s, t, y, w), **_factors(s, t, guide)},
    ),
    "at+kd": Method(
        "attention transfer and soft labels",
        f"{_AT_SOURCE}; {_KD_SOURCE}",
        ("attention", "alpha"),
        lambda s, t, y, guide, w: {**_soft_labels(s, t, y, w), **_attention(s, t, w)},
    ),
}
WEIGHTS = ("beta", "attention", "hint", "alpha")
