"""The two small networks of Factor Transfer: the paraphraser on the teacher's side, the translator on the student's.

Section 3.1 of the paper; channels and activations as in the authors' code (Models/FeatureProjection.py): three 3x3
convolutions with stride 1 and padding 1, LeakyReLU(0.1) after every one of them, the last included.
"""

from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

NORMS = (None, "batch")


def _check_channels(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} is {value!r}; it takes a positive number of channels.")


def _norm_layers(norm: str | None, channels: list[int]) -> nn.ModuleList | None:
    if norm not in NORMS:
        raise ValueError(f'norm is {norm!r}; it takes None (the authors\' code) or "batch".')
    return nn.ModuleList(nn.BatchNorm2d(count) for count in channels) if norm == "batch" else None


def _run_layers(x: Tensor, layers: nn.ModuleList, norm: nn.ModuleList | None, negative_slope: float) -> Tensor:
    for index, layer in enumerate(layers):
        x = layer(x)
        if norm is not None:
            x = norm[index](x)
        x = F.leaky_relu(x, negative_slope)
    return x


def _convolutions(channels: list[int]) -> nn.ModuleList:
    return nn.ModuleList(nn.Conv2d(a, b, 3, padding=1) for a, b in pairwise(channels))


class Paraphraser(nn.Module):
    """Compresses teacher features into factors, and reconstructs the features from them to be trained without labels.

    Args:
        in_channels: m, the channels of the teacher's feature map.
        rate: k, the paraphrase rate; the factor has ``max(1, round(m * k))`` channels.
        factor_channels: the factor's channels, overriding ``rate``.
        norm: None, as the authors' code, or ``"batch"`` for a batch norm after every convolution.
        negative_slope: of the LeakyReLUs.

    Keys: ``encoder.{0,1,2}.*``, ``decoder.{0,1,2}.*`` and, with batch norm, ``norm.{0,1,2}.*`` and ``decoder_norm.*``.
    """

    def __init__(
        self,
        in_channels: int,
        rate: float = 0.5,
        *,
        factor_channels: int | None = None,
        norm: str | None = None,
        negative_slope: float = 0.1,
    ) -> None:
        super().__init__()
        _check_channels("in_channels", in_channels)
        if factor_channels is None:
            if not isinstance(rate, (int, float)) or not 0 < rate < float("inf"):
                raise ValueError(f"rate is {rate!r}; it takes a positive number, 0.5 in the authors' code.")
            factor_channels = max(1, round(in_channels * rate))
        _check_channels("factor_channels", factor_channels)
        self.in_channels = in_channels
        self.factor_channels = factor_channels
        self.negative_slope = negative_slope
        m, mk = in_channels, factor_channels
        self.encoder = _convolutions([m, m, mk, mk])
        self.decoder = nn.ModuleList(nn.ConvTranspose2d(a, b, 3, padding=1) for a, b in ((mk, mk), (mk, m), (m, m)))
        self.norm = _norm_layers(norm, [m, mk, mk])
        self.decoder_norm = _norm_layers(norm, [mk, m, m])

    def encode(self, features: Tensor) -> Tensor:
        """``[N, in_channels, H, W]`` to factors ``[N, factor_channels, H, W]``."""
        return _run_layers(features, self.encoder, self.norm, self.negative_slope)

    def decode(self, factor: Tensor) -> Tensor:
        """Factors ``[N, factor_channels, H, W]`` to reconstructed features ``[N, in_channels, H, W]``."""
        return _run_layers(factor, self.decoder, self.decoder_norm, self.negative_slope)

    def forward(self, features: Tensor) -> Tensor:
        """The reconstruction ``decode(encode(features))``, whose distance to ``features`` is the training loss."""
        return self.decode(self.encode(features))


class Translator(nn.Module):
    """Maps student features to factors of the teacher's shape; trained together with the student.

    Args:
        in_channels: the channels of the student's feature map.
        factor_channels: the paraphraser's ``factor_channels``.
        norm: None, as the authors' code, or ``"batch"`` for a batch norm after every convolution.
        negative_slope: of the LeakyReLUs.

    Keys: ``encoder.{0,1,2}.*`` and, with batch norm, ``norm.{0,1,2}.*``.
    """

    def __init__(
        self, in_channels: int, factor_channels: int, *, norm: str | None = None, negative_slope: float = 0.1
    ) -> None:
        super().__init__()
        _check_channels("in_channels", in_channels)
        _check_channels("factor_channels", factor_channels)
        self.in_channels = in_channels
        self.factor_channels = factor_channels
        self.negative_slope = negative_slope
        channels = [in_channels, in_channels, factor_channels, factor_channels]
        self.encoder = _convolutions(channels)
        self.norm = _norm_layers(norm, channels[1:])

    def forward(self, features: Tensor) -> Tensor:
        """``[N, in_channels, H, W]`` to factors ``[N, factor_channels, H, W]``."""
        return _run_layers(features, self.encoder, self.norm, self.negative_slope)
