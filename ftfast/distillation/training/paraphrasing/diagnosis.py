"""What a paraphraser is worth.

One that learned nothing still gives factors, and students learn from them without a complaint; so its explained
variance and the spread of its factors are measured, on images that it was not trained on.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ftfast.modules import Paraphraser

LEAST_EXPLAINED_VARIANCE = 0.5
LEAST_SPREAD = 0.1


@dataclass(frozen=True)
class Diagnosis:
    """What a paraphraser is worth, on images that it was not trained on.

    Attributes:
        explained_variance: 1 less the squared error of the reconstruction over the features' variance between images;
            1 is perfect, 0 is what the mean feature map reaches.
        spread: root mean square distance of the normalised factors from their mean, over that of random directions;
            0 means one factor for every image.
    """

    explained_variance: float
    spread: float

    @property
    def is_finite(self) -> bool:
        """Whether factors and reconstruction are."""
        return math.isfinite(self.explained_variance) and math.isfinite(self.spread)

    @property
    def fault(self) -> str | None:
        """Why students can learn nothing from its factors, without a full stop; None where they can."""
        if not self.is_finite:
            return "the paraphraser's factors are not finite"
        if self.spread < LEAST_SPREAD:
            return (
                f"the paraphraser gives nearly the same factor for every image (spread {self.spread:.3f} of that of "
                f"random factors, at least {LEAST_SPREAD} is taken)"
            )
        return None

    @property
    def weakness(self) -> str | None:
        """Why it is poor, though it can be used, without a full stop; None where it is not."""
        if self.explained_variance >= LEAST_EXPLAINED_VARIANCE:
            return None
        return (
            f"the paraphraser explains {self.explained_variance:.2f} of the variance of held-out features, less than "
            f"{LEAST_EXPLAINED_VARIANCE}"
        )


@torch.no_grad()
def diagnose_paraphraser(paraphraser: Paraphraser, features: Tensor) -> Diagnosis:
    """The explained variance of a paraphraser's reconstructions and the spread of its factors.

    Args:
        paraphraser: in eval, as :func:`ftfast.train_paraphraser` leaves it.
        features: the teacher's maps ``[N, C, H, W]``, floating, on any device, of at least two images that it was not
            trained on.

    Raises:
        ValueError: features of fewer than two images.
    """
    if len(features) < 2:
        raise ValueError(f"features has {len(features)} images; it takes at least 2, to see whether factors differ.")
    features = features.to(next(paraphraser.parameters(), features))
    factors = paraphraser.encode(features)
    reconstruction = paraphraser(features)
    return Diagnosis(_explained_variance(features.float(), reconstruction.float()), _spread(factors.float()))


def _explained_variance(features: Tensor, reconstruction: Tensor) -> float:
    variance = (features - features.mean(0)).double().square().sum()
    error = (features - reconstruction).double().square().sum()
    return float(1 - error / variance) if variance > 0 else 0.0


def _spread(factors: Tensor) -> float:
    directions = F.normalize(factors.flatten(1), dim=1)
    distance = (directions - directions.mean(0)).square().sum(1).mean().sqrt()
    of_random = math.sqrt(1 - 1 / len(factors))  # independent directions: their mean has squared length 1/N
    return float(distance) / of_random
