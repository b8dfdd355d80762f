"""The distillation methods: a student learns its labels, and the terms of its method beside them."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ftfast.distillation.models.registry import Outputs
from ftfast.distillation.training.controls import CONTROLS
from ftfast.distillation.training.terms import (
    ATTENTION,
    FACTORS,
    FACTORS_P2,
    FACTORS_UNNORMALISED,
    HINTS,
    SOFT_LABELS,
    WEIGHTS,
    Between,
    Pair,
    Taught,
    Term,
    Weights,
    factors_of,
)

Terms = dict[str, Tensor]
"""The terms of a loss by name, which are summed."""


@dataclass(frozen=True)
class Method:
    """One way to teach a student; an entry of :data:`METHODS` is all that a run needs to know of it.

    Attributes:
        title: for the report.
        parts: its terms beside the labels; at most one has something between student and teacher.
        colour, line: of its curve, as matplotlib takes them.
    """

    title: str
    parts: tuple[Term, ...]
    colour: str
    line: Any

    @property
    def source(self) -> str:
        """For the report."""
        return "; ".join(part.source for part in self.parts)

    @property
    def weights(self) -> tuple[str, ...]:
        """Of :data:`WEIGHTS`, those that it has."""
        return tuple(name for name in WEIGHTS if any(name in part.weights for part in self.parts))

    @property
    def needs(self) -> set[str]:
        """What it takes of the teacher beside the images' labels, of ``"logits"``, ``"maps"`` and ``"factors"``."""
        return {need for part in self.parts for need in part.needs}

    @property
    def control(self) -> str | None:
        """Of :data:`CONTROLS`, what it has in the paraphraser's place."""
        return next((part.control for part in self.parts if part.control is not None), None)

    @property
    def has_rate(self) -> bool:
        """Whether the paraphrase rate decides what its factors are."""
        return "factors" in self.needs or (self.control is not None and CONTROLS[self.control].has_rate)

    def between(self, pair: Pair) -> Between | None:
        """Makes what stands between student and teacher, if anything does."""
        return next((part.between(pair) for part in self.parts if part.between is not None), None)

    def terms(
        self, student: Outputs, teacher: Taught | None, labels: Tensor, between: nn.Module | None, weights: Weights
    ) -> Terms:
        """Its loss as named terms that are summed; of soft labels with the weight alpha, the true ones have the rest.

        Args:
            teacher: None where the method needs nothing of it.
            between: the module of what :meth:`between` has made.
        """
        share = 1 - weights["alpha"] if SOFT_LABELS in self.parts else 1.0
        terms = {"labels": share * F.cross_entropy(student.logits.float(), labels)}
        return terms | {part.name: part.loss(student, teacher, between, weights) for part in self.parts}


def any_needs(methods: Iterable[str], *needs: str) -> bool:
    """Whether one of some methods takes one of these of the teacher."""
    return any(set(needs) & METHODS[method].needs for method in methods)


# Okabe and Ito's colours, told apart with every common colour vision; line styles tell them apart without colour.
METHODS = {
    "none": Method("labels only", (), "#000000", "-"),
    "kd": Method("soft labels", (SOFT_LABELS,), "#0072B2", "-."),
    "at": Method("attention transfer", (ATTENTION,), "#E69F00", (0, (5, 1))),
    "fitnet": Method("hints", (HINTS,), "#CC79A7", (0, (3, 1, 1, 1))),
    "ft": Method("Factor Transfer", (FACTORS,), "#D55E00", "--"),
    "ft+kd": Method("Factor Transfer and soft labels", (SOFT_LABELS, FACTORS), "#009E73", ":"),
    "at+kd": Method("attention transfer and soft labels", (SOFT_LABELS, ATTENTION), "#56B4E9", (0, (1, 2))),
    "ft-p2": Method("Factor Transfer with p=2", (FACTORS_P2,), "#882255", (0, (6, 1))),
    "ft-unnormalised": Method(
        "Factor Transfer without normalisation, a control", (FACTORS_UNNORMALISED,), "#999933", (0, (4, 2))
    ),
    **{
        f"ft-{name}": Method(f"factors from {title}, a control", (factors_of(name),), colour, line)
        for name, title, colour, line in (
            ("untrained", "an untrained paraphraser", "#999999", (0, (1, 1))),
            ("autoencoder", "a plain autoencoder", "#44AA99", (0, (3, 1))),
            ("regularised", "a regularised autoencoder", "#117733", (0, (3, 1, 1, 1, 1, 1))),
            ("features", "the teacher's features themselves", "#332288", (0, (5, 2, 1, 2))),
        )
    },
}
