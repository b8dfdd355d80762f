"""The terms that a student's loss may have beside its labels. All compare the same two feature maps."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ftfast.arguments import Backend
from ftfast.distillation.models.registry import Outputs
from ftfast.distillation.training.controls import CONTROLS
from ftfast.head import FactorTransfer
from ftfast.modules import Paraphraser, Translator
from ftfast.ops.attention.difference import attention_difference

TEMPERATURE = 4.0


class Stored(NamedTuple):
    """What a factor store knows of a batch in the teacher's place.

    Factors ``[N, factor_channels, H, W]``, floating, int8 or float8_e4m3fn, whose direction alone counts; and where
    they were stored, logits ``[N, classes]``.
    """

    factors: Tensor
    logits: Tensor | None = None


Taught = Outputs | Stored
"""What a student's loss compares with."""


Weights = dict[str, float]
"""The weights of a student's loss by name, those of its method alone, and ``"temperature"`` of the soft labels."""


@dataclass(frozen=True)
class Weight:
    """A weight that methods give a term of their loss; each is a setting of that name.

    Attributes:
        meaning: what is weighted, as ``--help`` says it.
        grid: the values that a run chooses from where its settings give none, the middle one being the customary; None
            for those of the factor transfer loss, which depend on the factor's size.
        most: the largest value.
    """

    meaning: str
    grid: tuple[float, ...] | None
    most: float = math.inf


# In the units of the terms' mean forms; the grids are about what the methods' papers and their papers' code use.
WEIGHTS = {
    "beta": Weight("the factor transfer loss (default: round 500*sqrt(D/2048))", None),
    "attention": Weight("attention transfer", (500.0, 1000.0, 2000.0)),
    "hint": Weight("the hints", (1.0, 10.0, 100.0)),
    "alpha": Weight("the soft labels against the true ones, 0 to 1", (0.5, 0.7, 0.9), most=1),
}


def customary(name: str, factor_size: int) -> float:
    """The value of a weight where none is chosen; that of the factor transfer loss suits factors of so many numbers."""
    grid = WEIGHTS[name].grid
    # The mean form shrinks like 1/sqrt(D); 500 suits CIFAR.
    return 500 * math.sqrt(factor_size / 2048) if grid is None else grid[len(grid) // 2]


@dataclass(frozen=True)
class Pair:
    """What stands between a student and its teacher is built from this.

    Attributes:
        student_channels, teacher_channels: of the two feature maps.
        paraphraser: the teacher's, frozen; None where no method of the run uses factors.
        controls: what stands in the paraphraser's place for methods that are controls, frozen, by name.
        backend: of the factor transfer loss.
    """

    student_channels: int
    teacher_channels: int
    paraphraser: Paraphraser | None
    weights: Weights
    controls: Mapping[str, nn.Module] = field(default_factory=dict)
    backend: Backend = "auto"


class Between(NamedTuple):
    """A module that compares student and teacher, and what of it learns with the student, under its name there."""

    module: nn.Module
    name: str
    learns: nn.Module


class Regressor(nn.Module):
    """FitNets' map from a student's features to the size of the teacher's: a 1x1 convolution that learns with it."""

    def __init__(self, student_channels: int, teacher_channels: int) -> None:
        super().__init__()
        self.projection = nn.Conv2d(student_channels, teacher_channels, 1)

    def forward(self, features: Tensor) -> Tensor:
        """``[N, student_channels, H, W]`` to ``[N, teacher_channels, H, W]``."""
        return self.projection(features)


class UnnormalisedHead(nn.Module):
    """``weight`` times the mean absolute difference of the factors themselves: the loss without its normalisation."""

    def __init__(self, paraphraser: Paraphraser, translator: Translator, weight: float) -> None:
        super().__init__()
        self.paraphraser = paraphraser.requires_grad_(False).eval()
        self.translator = translator
        self.weight = weight

    def forward(
        self, student_features: Tensor, teacher_features: Tensor | None = None, teacher_factor: Tensor | None = None
    ) -> Tensor:
        """The loss of maps ``[N, C, H, W]``, or of the student's and the teacher's factor."""
        if teacher_factor is None:
            assert teacher_features is not None
            with torch.no_grad():
                teacher_factor = self.paraphraser.encode(teacher_features)
        return self.weight * F.l1_loss(self.translator(student_features).float(), teacher_factor.float())


@dataclass(frozen=True)
class Term:
    """One thing that a student is taught beside its labels; several make up a method.

    Attributes:
        name: in logs and results.
        source: for the report.
        weights: of :data:`WEIGHTS`, those that it has.
        needs: what it takes of the teacher, of ``"logits"``, ``"maps"`` and ``"factors"``.
        loss: of the student's outputs, what the teacher says, what stands between the two, and weights.
        between: makes what stands between student and teacher, if anything does.
        control: of :data:`ftfast.distillation.training.controls.CONTROLS`, what it has in the paraphraser's place.
    """

    name: str
    source: str
    weights: tuple[str, ...]
    needs: tuple[str, ...]
    loss: Callable[[Outputs, Any, Any, Weights], Tensor]
    between: Callable[[Pair], Between] | None = None
    control: str | None = None


def _factor_head(pair: Pair, p: int = 1, control: str | None = None) -> Between:
    paraphraser: Any = pair.paraphraser if control is None else pair.controls[control]
    translator_of = Translator if control is None else CONTROLS[control].translator
    translator = translator_of(pair.student_channels, paraphraser.factor_channels)
    head = FactorTransfer(paraphraser, translator, p=p, weight=pair.weights["beta"], backend=pair.backend)
    return Between(head.hold_weights(), "translator", translator)


def _unnormalised_head(pair: Pair) -> Between:
    assert pair.paraphraser is not None
    translator = Translator(pair.student_channels, pair.paraphraser.factor_channels)
    return Between(UnnormalisedHead(pair.paraphraser, translator, pair.weights["beta"]), "translator", translator)


def _regressor(pair: Pair) -> Between:
    regressor = Regressor(pair.student_channels, pair.teacher_channels)
    return Between(regressor, "regressor", regressor)


def _soft_labels(student: Outputs, teacher: Taught, _between: None, weights: Weights) -> Tensor:
    """``alpha * T^2 * KL(teacher, student)`` at temperature T, which T^2 keeps in proportion to the labels' term."""
    assert teacher.logits is not None
    temperature = weights.get("temperature", TEMPERATURE)
    student_log = F.log_softmax(student.logits.float() / temperature, dim=1)
    teacher_log = F.log_softmax(teacher.logits.float() / temperature, dim=1)
    divergence = temperature**2 * F.kl_div(student_log, teacher_log, log_target=True, reduction="batchmean")
    return weights["alpha"] * divergence


def _factors(student: Outputs, teacher: Taught, head: nn.Module, _weights: Weights) -> Tensor:
    """``beta * L_FT``: the head carries beta as its ``weight``."""
    if isinstance(teacher, Stored):
        return head(student.features, teacher_factor=teacher.factors)
    return head(student.features, teacher.features)


def _as_p1(of_random: Callable[[int], float]) -> Callable[[Outputs, Taught, Any, Weights], Tensor]:
    """The factors' loss in units in which random factors cost what they cost p=1, so that one beta suits both.

    Args:
        of_random: the size D of a factor to the loss of random ones.
    """

    def loss(student: Outputs, teacher: Taught, head: FactorTransfer | UnnormalisedHead, weights: Weights) -> Tensor:
        size = math.prod(student.features.shape[2:]) * head.translator.factor_channels
        return _factors(student, teacher, head, weights) * (_MEAN_ABSOLUTE * math.sqrt(2 / size) / of_random(size))

    return loss


def _attention(student: Outputs, teacher: Outputs, _between: None, weights: Weights) -> Tensor:
    """The mean square of the difference of two unit vectors ``[N, H*W]``, the mean of squares over channels."""
    return weights["attention"] * attention_difference(student.features, teacher.features, p=2)


def _hints(student: Outputs, teacher: Outputs, regressor: nn.Module, weights: Weights) -> Tensor:
    return weights["hint"] * F.mse_loss(regressor(student.features).float(), teacher.features.float())


# Of a normal number; the entries of two independent directions differ by one with the variance 2/D.
_MEAN_ABSOLUTE = math.sqrt(2 / math.pi)
_FT_SOURCE = "Kim, Park and Kwak, Paraphrasing Complex Network, NeurIPS 2018, section 3"
_CONTROL_SOURCE = f"a control of the ablation; {_FT_SOURCE}"

SOFT_LABELS = Term(
    "soft_labels",
    "Hinton, Vinyals and Dean, Distilling the Knowledge in a Neural Network, 2015, section 2",
    ("alpha",),
    ("logits",),
    _soft_labels,
)
ATTENTION = Term(
    "attention",
    "Zagoruyko and Komodakis, Paying More Attention to Attention, ICLR 2017, section 3.1, at the last features",
    ("attention",),
    ("maps",),
    _attention,
)
HINTS = Term(
    "hints",
    "Romero et al., FitNets, ICLR 2015, section 2.2, at the last features and in one stage with the labels",
    ("hint",),
    ("maps",),
    _hints,
    _regressor,
)
FACTORS = Term("factors", _FT_SOURCE, ("beta",), ("factors",), _factors, _factor_head)
FACTORS_P2 = replace(FACTORS, loss=_as_p1(lambda size: math.sqrt(2)), between=partial(_factor_head, p=2))
FACTORS_UNNORMALISED = replace(
    FACTORS,
    source=_CONTROL_SOURCE,
    loss=_as_p1(lambda size: math.sqrt(2) * _MEAN_ABSOLUTE),
    between=_unnormalised_head,
)


def factors_of(control: str) -> Term:
    """Factor Transfer's loss and translator, with something else in the paraphraser's place."""
    between = partial(_factor_head, control=control)
    return replace(FACTORS, source=_CONTROL_SOURCE, needs=("maps",), between=between, control=control)
