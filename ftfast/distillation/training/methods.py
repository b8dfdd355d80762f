"""The distillation methods: which terms a student's loss has. All compare the same two feature maps."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ftfast.arguments import Backend
from ftfast.distillation.models.registry import Outputs
from ftfast.distillation.training.controls import CONTROLS
from ftfast.head import FactorTransfer
from ftfast.modules import Paraphraser, Translator
from ftfast.ops.attention import attention_difference

Terms = dict[str, Tensor]
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


@dataclass(frozen=True)
class Method:
    """One way to teach a student; an entry of :data:`METHODS` is all that a run needs to know of it.

    Attributes:
        title, source: for the report.
        weights: of :data:`WEIGHTS`, those that it has.
        needs: what it takes of the teacher beside the images' labels, of ``"logits"``, ``"maps"`` and ``"factors"``.
        terms: its loss as named terms that are summed, of the student's outputs, what the teacher says, labels, what
            stands between the two, and weights.
        colour, line: of its curve, as matplotlib takes them.
        between: makes what stands between student and teacher, if anything does.
        control: of :data:`ftfast.distillation.training.controls.CONTROLS`, what it has in the paraphraser's place.
    """

    title: str
    source: str
    weights: tuple[str, ...]
    needs: tuple[str, ...]
    terms: Callable[[Outputs, Taught | None, Tensor, nn.Module | None, Weights], Terms]
    colour: str
    line: Any
    between: Callable[[Pair], Between] | None = None
    control: str | None = None

    @property
    def has_rate(self) -> bool:
        """Whether the paraphrase rate decides what its factors are."""
        return "factors" in self.needs or (self.control is not None and CONTROLS[self.control].has_rate)


def any_needs(methods: Iterable[str], *needs: str) -> bool:
    """Whether one of some methods takes one of these of the teacher."""
    return any(set(needs) & set(METHODS[method].needs) for method in methods)


def _labels(student: Outputs, labels: Tensor, weight: float = 1.0) -> Terms:
    return {"labels": weight * F.cross_entropy(student.logits.float(), labels)}


def _soft_labels(student: Outputs, teacher: Taught | None, labels: Tensor, weights: Weights) -> Terms:
    """``(1 - alpha) * labels + alpha * T^2 * KL(teacher, student)`` at temperature T, which T^2 keeps in proportion."""
    assert teacher is not None
    assert teacher.logits is not None
    alpha, temperature = weights["alpha"], weights.get("temperature", TEMPERATURE)
    student_log = F.log_softmax(student.logits.float() / temperature, dim=1)
    teacher_log = F.log_softmax(teacher.logits.float() / temperature, dim=1)
    divergence = temperature**2 * F.kl_div(student_log, teacher_log, log_target=True, reduction="batchmean")
    return {**_labels(student, labels, 1 - alpha), "soft_labels": alpha * divergence}


def _factors(student: Outputs, teacher: Taught | None, head: nn.Module | None) -> Terms:
    """``beta * L_FT``: the head carries beta as its ``weight``."""
    assert teacher is not None
    assert head is not None
    if isinstance(teacher, Stored):
        return {"factors": head(student.features, teacher_factor=teacher.factors)}
    return {"factors": head(student.features, teacher.features)}


def _as_p1(
    student: Outputs, teacher: Taught | None, head: nn.Module | None, of_random: Callable[[int], float]
) -> Terms:
    """The factors' term in units in which random factors cost what they cost p=1, so that one beta suits both.

    Args:
        of_random: the size D of a factor to the loss of random ones.
    """
    assert isinstance(head, FactorTransfer | UnnormalisedHead)
    size = math.prod(student.features.shape[2:]) * head.translator.factor_channels
    term = _factors(student, teacher, head)["factors"]
    return {"factors": term * (_MEAN_ABSOLUTE * math.sqrt(2 / size) / of_random(size))}


def _attention(student: Outputs, teacher: Taught | None, weights: Weights) -> Terms:
    """The mean square of the difference of two unit vectors ``[N, H*W]``, the mean of squares over channels."""
    assert isinstance(teacher, Outputs)
    return {"attention": weights["attention"] * attention_difference(student.features, teacher.features, p=2)}


def _hints(student: Outputs, teacher: Taught | None, regressor: nn.Module | None, weights: Weights) -> Terms:
    assert isinstance(teacher, Outputs)
    assert regressor is not None
    return {"hints": weights["hint"] * F.mse_loss(regressor(student.features).float(), teacher.features.float())}


# Of a normal number; the entries of two independent directions differ by one with the variance 2/D.
_MEAN_ABSOLUTE = math.sqrt(2 / math.pi)
_FT_SOURCE = "Kim, Park and Kwak, Paraphrasing Complex Network, NeurIPS 2018, section 3"
_KD_SOURCE = "Hinton, Vinyals and Dean, Distilling the Knowledge in a Neural Network, 2015, section 2"
_AT_SOURCE = "Zagoruyko and Komodakis, Paying More Attention to Attention, ICLR 2017, section 3.1, at the last features"
_FITNET_SOURCE = "Romero et al., FitNets, ICLR 2015, section 2.2, at the last features and in one stage with the labels"

_CONTROL_SOURCE = f"a control of the ablation; {_FT_SOURCE}"


def _control(title: str, control: str, colour: str, line: Any) -> Method:
    """Factor Transfer's loss and translator, with something else in the paraphraser's place."""
    return Method(
        f"factors from {title}, a control",
        _CONTROL_SOURCE,
        ("beta",),
        ("maps",),
        lambda s, t, y, between, w: {**_labels(s, y), **_factors(s, t, between)},
        colour,
        line,
        lambda pair: _factor_head(pair, control=control),
        control,
    )


# Okabe and Ito's colours, told apart with every common colour vision; line styles tell them apart without colour.
METHODS = {
    "none": Method("labels only", "", (), (), lambda s, t, y, between, w: _labels(s, y), "#000000", "-"),
    "kd": Method(
        "soft labels",
        _KD_SOURCE,
        ("alpha",),
        ("logits",),
        lambda s, t, y, between, w: _soft_labels(s, t, y, w),
        "#0072B2",
        "-.",
    ),
    "at": Method(
        "attention transfer",
        _AT_SOURCE,
        ("attention",),
        ("maps",),
        lambda s, t, y, between, w: {**_labels(s, y), **_attention(s, t, w)},
        "#E69F00",
        (0, (5, 1)),
    ),
    "fitnet": Method(
        "hints",
        _FITNET_SOURCE,
        ("hint",),
        ("maps",),
        lambda s, t, y, between, w: {**_labels(s, y), **_hints(s, t, between, w)},
        "#CC79A7",
        (0, (3, 1, 1, 1)),
        _regressor,
    ),
    "ft": Method(
        "Factor Transfer",
        _FT_SOURCE,
        ("beta",),
        ("factors",),
        lambda s, t, y, between, w: {**_labels(s, y), **_factors(s, t, between)},
        "#D55E00",
        "--",
        _factor_head,
    ),
    "ft+kd": Method(
        "Factor Transfer and soft labels",
        f"{_FT_SOURCE}; {_KD_SOURCE}",
        ("beta", "alpha"),
        ("factors", "logits"),
        lambda s, t, y, between, w: {**_soft_labels(s, t, y, w), **_factors(s, t, between)},
        "#009E73",
        ":",
        _factor_head,
    ),
    "at+kd": Method(
        "attention transfer and soft labels",
        f"{_AT_SOURCE}; {_KD_SOURCE}",
        ("attention", "alpha"),
        ("maps", "logits"),
        lambda s, t, y, between, w: {**_soft_labels(s, t, y, w), **_attention(s, t, w)},
        "#56B4E9",
        (0, (1, 2)),
    ),
    "ft-p2": Method(
        "Factor Transfer with p=2",
        _FT_SOURCE,
        ("beta",),
        ("factors",),
        lambda s, t, y, between, w: {**_labels(s, y), **_as_p1(s, t, between, lambda size: math.sqrt(2))},
        "#882255",
        (0, (6, 1)),
        lambda pair: _factor_head(pair, p=2),
    ),
    "ft-unnormalised": Method(
        "Factor Transfer without normalisation, a control",
        _CONTROL_SOURCE,
        ("beta",),
        ("factors",),
        lambda s, t, y, between, w: {
            **_labels(s, y),
            **_as_p1(s, t, between, lambda size: math.sqrt(2) * _MEAN_ABSOLUTE),
        },
        "#999933",
        (0, (4, 2)),
        _unnormalised_head,
    ),
    "ft-untrained": _control("an untrained paraphraser", "untrained", "#999999", (0, (1, 1))),
    "ft-autoencoder": _control("a plain autoencoder", "autoencoder", "#44AA99", (0, (3, 1))),
    "ft-regularised": _control("a regularised autoencoder", "regularised", "#117733", (0, (3, 1, 1, 1, 1, 1))),
    "ft-features": _control("the teacher's features themselves", "features", "#332288", (0, (5, 2, 1, 2))),
}
