"""Controls of Factor Transfer: what a student is taught where no trained paraphraser stands on the teacher's side.

The paper sets its paraphraser against autoencoders; its text does not give their layers, so they are ours: the plain
one halves the map as autoencoders of images do, the regularised one is a paraphraser whose factors are kept small.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ftfast.modules import Paraphraser, Translator

_STRIDES = (1, 2, 1)


def _layers(channels: list[int], strides: tuple[int, ...]) -> nn.Sequential:
    made: list[nn.Module] = []
    for (count, following), stride in zip(pairwise(channels), strides, strict=True):
        made += [nn.Conv2d(count, following, 3, stride, padding=1), nn.LeakyReLU(0.1)]
    return nn.Sequential(*made)


class StridedTranslator(nn.Module):
    """A translator whose second convolution halves the map: ``[N, C, H, W]`` to ``[N, factor_channels, H/2, W/2]``."""

    def __init__(self, in_channels: int, factor_channels: int) -> None:
        super().__init__()
        self.factor_channels = factor_channels
        self.encoder = _layers([in_channels, in_channels, factor_channels, factor_channels], _STRIDES)

    def forward(self, features: Tensor) -> Tensor:
        """Factors of the student's features."""
        return self.encoder(features)


class Autoencoder(nn.Module):
    """A plain convolutional autoencoder: a paraphraser's layers, of which the second halves the map."""

    def __init__(self, in_channels: int, rate: float) -> None:
        super().__init__()
        self.factor_channels = max(1, round(in_channels * rate))
        channels = [in_channels, in_channels, self.factor_channels, self.factor_channels]
        self.encoder = _layers(channels, _STRIDES)
        self.decoder = _layers(channels[::-1], (1, 1, 1))

    def encode(self, features: Tensor) -> Tensor:
        """``[N, in_channels, H, W]`` to ``[N, factor_channels, H/2, W/2]``, rounded up."""
        return self.encoder(features)

    def forward(self, features: Tensor) -> Tensor:
        """The reconstruction, in the features' shape."""
        return self.decoder(F.interpolate(self.encode(features), features.shape[2:], mode="nearest"))


class Features(nn.Module):
    """The teacher's features as they are, in a factor's place."""

    def __init__(self, in_channels: int, rate: float) -> None:
        super().__init__()
        self.factor_channels = in_channels

    def encode(self, features: Tensor) -> Tensor:
        """``features`` themselves."""
        return features

    forward = encode


@dataclass(frozen=True)
class Control:
    """What stands in the paraphraser's place.

    Attributes:
        build: of the teacher's channels and the paraphrase rate; the module has ``encode`` and ``factor_channels``.
        learns: whether it is trained to reconstruct the features, as a paraphraser is.
        penalty: what the mean absolute factor counts for beside the reconstruction.
        translator: of the student's channels and the factor's, whose factors have the shape of this one's.
        has_rate: whether the paraphrase rate decides its factor's channels.
    """

    build: Callable[[int, float], Any]
    learns: bool = False
    penalty: float = 0.0
    translator: Callable[[int, int], Any] = Translator
    has_rate: bool = True


CONTROLS = {
    "untrained": Control(Paraphraser),
    "autoencoder": Control(Autoencoder, learns=True, translator=StridedTranslator),
    "regularised": Control(Paraphraser, learns=True, penalty=0.1),
    "features": Control(Features, has_rate=False),
}
