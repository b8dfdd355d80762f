"""AberHu/Knowledge-Distillation-Zoo: ``kd_losses/ft.py`` and the two networks of ``network.py``.

``from ftfast.compat.zoo import FT, define_paraphraser, define_translator`` goes below the imports of ``train_ft.py``,
whose ``from kd_losses import *`` would take ``FT`` back. Checkpoints of the ``define_*`` functions have the prefix
``module.``, as there.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ftfast.compat.directions import EPS, direction, is_overridden
from ftfast.compat.networks import PeerNetwork, check_channels, convolutions, truncated_channels
from ftfast.ops.ft_loss.function import run

__all__ = ["FT", "define_paraphraser", "define_translator", "paraphraser", "translator"]


class FT(nn.Module):
    """The mean absolute difference of two normalised factors, the official loss without its weight."""

    def forward(self, factor_s: Tensor, factor_t: Tensor) -> Tensor:
        """The loss, 0-d, of ``factor_s`` and ``factor_t``, both ``[N, ...]``; a teacher that requires a gradient gets
        one.

        Raises:
            TypeError, ValueError: as :func:`ftfast.ft_loss`.
        """
        if is_overridden(self, FT, "normalize"):
            return F.l1_loss(self.normalize(factor_s), self.normalize(factor_t))
        return run(factor_s, factor_t, p=1, reduction="mean", eps=EPS, weight=1.0, backend="auto")

    def normalize(self, factor: Tensor) -> Tensor:
        """``[N, ...]`` to unit vectors ``[N, D]``, float32 (float64 for float64)."""
        return direction(factor)


class paraphraser(PeerNetwork):
    """Encoder and decoder of the teacher's features.

    Args:
        in_channels_t: m, the channels of the teacher's features.
        k: the paraphrase rate; the factor has ``int(m * k)`` channels.
        use_bn: batch norm after every convolution, which then has no bias.

    Keys: ``encoder.{0,3,6}.*``, ``decoder.{0,3,6}.*`` and, with batch norm, ``.{1,4,7}.*``.
    """

    def __init__(self, in_channels_t: int, k: float, use_bn: bool = True) -> None:
        super().__init__()
        m, mk = in_channels_t, truncated_channels("in_channels_t", in_channels_t, k)
        self.encoder = convolutions([m, m, mk, mk], use_bn=use_bn, bias=not use_bn)
        self.decoder = convolutions([mk, mk, m, m], use_bn=use_bn, transposed=True, bias=not use_bn)
        _initialise(self)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Features ``[N, m, H, W]`` to the factor ``[N, int(m * k), H, W]`` and the reconstruction."""
        factor = self.encoder(x)
        return factor, self.decoder(factor)


class translator(PeerNetwork):
    """Student features to factors.

    Args:
        in_channels_s: the channels of the student's features.
        in_channels_t: the channels of the teacher's features.
        k: the paraphrase rate; the factor has ``int(in_channels_t * k)`` channels.
        use_bn: batch norm after every convolution, which then has no bias.

    Keys: ``encoder.{0,3,6}.*`` and, with batch norm, ``encoder.{1,4,7}.*``.
    """

    def __init__(self, in_channels_s: int, in_channels_t: int, k: float, use_bn: bool = True) -> None:
        super().__init__()
        check_channels(in_channels_s=in_channels_s)
        s, mk = in_channels_s, truncated_channels("in_channels_t", in_channels_t, k)
        self.encoder = convolutions([s, s, mk, mk], use_bn=use_bn, bias=not use_bn)
        _initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """Features ``[N, in_channels_s, H, W]`` to factors."""
        return self.encoder(x)


def define_paraphraser(in_channels_t: int, k: float, use_bn: bool, cuda: bool = True) -> nn.Module:
    """A :class:`paraphraser` in ``DataParallel``, on the GPU with ``cuda``."""
    return _parallel(paraphraser(in_channels_t, k, use_bn), cuda)


def define_translator(
    in_channels_s: int, in_channels_t: int, k: float, use_bn: bool = True, cuda: bool = True
) -> nn.Module:
    """A :class:`translator` in ``DataParallel``, on the GPU with ``cuda``."""
    return _parallel(translator(in_channels_s, in_channels_t, k, use_bn), cuda)


def _parallel(network: nn.Module, cuda: bool) -> nn.Module:
    if cuda and not torch.cuda.is_available():
        raise RuntimeError("cuda is True and torch finds no CUDA device; pass cuda=False.")
    parallel: Any = nn.DataParallel(network)
    return parallel.cuda() if cuda else parallel


def _initialise(network: nn.Module) -> None:
    """He's initialisation of the convolutions; the transposed ones keep torch's, as there."""
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
