"""open-mmlab/mmrazor: ``models/losses/factor_transfer_loss.py`` and the connectors of
``models/architectures/connectors/factor_transfer_connectors.py``.

mmrazor's configurations find classes by name; these take the place of its own with
``mmrazor.registry.MODELS.register_module(module=CLASS, force=True)`` for each. They need neither mmrazor nor mmengine.
"""

from typing import Any

import torch
from torch import Tensor, nn

from ftfast.arguments import check_options
from ftfast.compat.directions import EPS, direction
from ftfast.compat.networks import PeerNetwork, check_channels, convolutions
from ftfast.ops.ft_loss import run

__all__ = ["FTLoss", "Paraphraser", "Translator"]

PHASES = ("pretrain", "train")


class FTLoss(nn.Module):
    """The official loss times a weight.

    Args:
        loss_weight: 1.0 by default, 500 times below the authors' beta.
    """

    def __init__(self, loss_weight: float | Tensor = 1.0) -> None:
        super().__init__()
        check_options(p=1, reduction="mean", eps=EPS, weight=loss_weight)
        self.loss_weight = loss_weight

    def forward(self, s_feature: Tensor, t_feature: Tensor) -> Tensor:
        """``loss_weight * forward_train(s_feature, t_feature)``, both ``[N, ...]``, in one kernel.

        Raises:
            TypeError, ValueError: as :func:`ftfast.ft_loss`.
        """
        weight = self.loss_weight
        weight = float(weight) if isinstance(weight, int) else weight
        return run(s_feature, t_feature, p=1, reduction="mean", eps=EPS, weight=weight, backend="auto")

    def forward_train(self, s_feature: Tensor, t_feature: Tensor) -> Tensor:
        """The loss without its weight."""
        return run(s_feature, t_feature, p=1, reduction="mean", eps=EPS, weight=1.0, backend="auto")

    def factor(self, x: Tensor) -> Tensor:
        """``[N, ...]`` to unit vectors ``[N, D]``, float32 (float64 for float64)."""
        return direction(x)


class Paraphraser(PeerNetwork):
    """The teacher's connector.

    Args:
        in_channel: m, the channels of the teacher's features.
        out_channel: the factor's channels.
        phase: ``"pretrain"`` gives reconstructions, ``"train"`` factors without a gradient; an attribute that may be
            changed at any step.
        use_bn: batch norm after every convolution.
        init_cfg: mmengine's; kept, and not acted upon.

    Keys: ``encoder.{0,3,6}.*``, ``decoder.{0,3,6}.*`` and, with batch norm, ``.{1,4,7}.*``.
    """

    def __init__(
        self,
        in_channel: int,
        out_channel: int,
        phase: str = "pretrain",
        use_bn: bool | None = False,
        init_cfg: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        check_channels(in_channel=in_channel, out_channel=out_channel)
        self.init_cfg = init_cfg
        self.encoder = convolutions([in_channel, in_channel, out_channel, out_channel], use_bn=bool(use_bn))
        self.decoder = convolutions(
            [out_channel, out_channel, in_channel, in_channel], use_bn=bool(use_bn), transposed=True
        )
        self.phase = phase
        self._check_phase()

    def _check_phase(self) -> None:
        if self.phase not in PHASES:
            raise ValueError(f'phase is {self.phase!r}; it takes "pretrain" or "train".')

    def forward(self, x: Tensor) -> Tensor:
        """:meth:`forward_pretrain` or :meth:`forward_train`, by the phase."""
        self._check_phase()
        return self.forward_train(x) if self.phase == "train" else self.forward_pretrain(x)

    def forward_train(self, x: Tensor) -> Tensor:
        """Features ``[N, m, H, W]`` to factors, under ``no_grad``."""
        with torch.no_grad():
            return self.encoder(x)

    def forward_pretrain(self, t_feat: Tensor) -> Tensor:
        """Features ``[N, m, H, W]`` to their reconstruction."""
        return self.decoder(self.encoder(t_feat))


class Translator(PeerNetwork):
    """The student's connector.

    Args:
        in_channel: the channels of the student's features.
        out_channel: the factor's channels.
        use_bn: batch norm after every convolution; on by default, unlike the paraphraser's.
        init_cfg: mmengine's; kept, and not acted upon.

    Keys: ``encoder.{0,3,6}.*`` and, with batch norm, ``encoder.{1,4,7}.*``.
    """

    def __init__(
        self,
        in_channel: int,
        out_channel: int,
        use_bn: bool | None = True,
        init_cfg: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        check_channels(in_channel=in_channel, out_channel=out_channel)
        self.init_cfg = init_cfg
        self.encoder = convolutions([in_channel, in_channel, out_channel, out_channel], use_bn=bool(use_bn))

    def forward(self, feature: Tensor) -> Tensor:
        """Features ``[N, in_channel, H, W]`` to factors ``[N, out_channel, H, W]``."""
        return self.forward_train(feature)

    def forward_train(self, x: Tensor) -> Tensor:
        """What :meth:`forward` calls."""
        return self.encoder(x)
