"""open-mmlab/mmrazor: ``models/losses/factor_transfer_loss.py`` and the connectors of
``models/architectures/connectors/factor_transfer_connectors.py``.

mmrazor's configurations find classes by name; these take the place of its own where a configuration has
``custom_imports = dict(imports=["ftfast.compat.mmrazor.replace"])``. They need neither mmrazor nor mmengine.
"""

import copy
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from ftfast.arguments import check_options
from ftfast.compat.directions import EPS, direction, is_overridden
from ftfast.compat.networks import PeerNetwork, check_channels, convolutions
from ftfast.ops.ft_loss.function import run

__all__ = ["FTLoss", "Paraphraser", "Translator"]

PHASES = ("pretrain", "train")


class FTLoss(nn.Module):
    """The official loss times a weight.

    Args:
        loss_weight: 1.0 by default, 500 times below the authors' beta.

    Attributes:
        criterion: ``nn.L1Loss()``, and replaceable, as there: another one is given the two factors' directions.
    """

    def __init__(self, loss_weight: float | Tensor = 1.0) -> None:
        super().__init__()
        check_options(p=1, reduction="mean", eps=EPS, weight=loss_weight)
        self.criterion: nn.Module = nn.L1Loss()
        self.loss_weight = loss_weight

    def forward(self, s_feature: Tensor, t_feature: Tensor) -> Tensor:
        """``loss_weight * forward_train(s_feature, t_feature)``, both ``[N, ...]``, in one kernel.

        Raises:
            TypeError, ValueError: as :func:`ftfast.ft_loss`.
        """
        if not self._is_the_peers() or is_overridden(self, FTLoss, "forward_train"):
            return self.loss_weight * self.forward_train(s_feature, t_feature)
        weight = self.loss_weight
        weight = float(weight) if isinstance(weight, int) else weight
        return run(s_feature, t_feature, p=1, reduction="mean", eps=EPS, weight=weight, backend="auto")

    def forward_train(self, s_feature: Tensor, t_feature: Tensor) -> Tensor:
        """The loss without its weight."""
        if not self._is_the_peers():
            return self.criterion(self.factor(s_feature), self.factor(t_feature))
        return run(s_feature, t_feature, p=1, reduction="mean", eps=EPS, weight=1.0, backend="auto")

    def factor(self, x: Tensor) -> Tensor:
        """``[N, ...]`` to unit vectors ``[N, D]``, float32 (float64 for float64)."""
        return direction(x)

    def _is_the_peers(self) -> bool:
        """Whether neither the criterion nor the factor was replaced."""
        criterion = self.criterion
        is_plain = type(criterion) is nn.L1Loss and criterion.reduction == "mean" and not criterion._forward_hooks
        return is_plain and not is_overridden(self, FTLoss, "factor")


class Connector(PeerNetwork):
    """What the two connectors have of mmengine's ``BaseModule``.

    Args:
        init_cfg: how mmengine initialises the weights; None leaves them as torch draws them.
    """

    def __init__(self, init_cfg: dict[str, Any] | list[dict[str, Any]] | None = None) -> None:
        super().__init__()
        self.init_cfg = copy.deepcopy(init_cfg)
        self.is_init = False

    def init_weights(self) -> None:
        """Initialises the weights once as ``init_cfg`` says; mmengine's runner calls it before training.

        Raises:
            ImportError: there is an ``init_cfg`` and no mmengine.
        """
        if self.init_cfg and not self.is_init:
            try:
                initialize = import_module("mmengine.model").initialize
            except ImportError as error:
                raise ImportError(
                    f"init_cfg is {self.init_cfg!r}, which mmengine acts upon, and it does not import ({error}); "
                    "install it, or leave init_cfg out.",
                    name=error.name,
                ) from error
            initialize(self, self.init_cfg)
        self.is_init = True


class Paraphraser(Connector):
    """The teacher's connector.

    Args:
        in_channel: m, the channels of the teacher's features.
        out_channel: the factor's channels.
        phase: ``"pretrain"`` gives reconstructions, ``"train"`` factors without a gradient; an attribute that may be
            changed at any step.
        use_bn: batch norm after every convolution.
        init_cfg: mmengine's, acted upon by :meth:`init_weights`.

    Keys: ``encoder.{0,3,6}.*``, ``decoder.{0,3,6}.*`` and, with batch norm, ``.{1,4,7}.*``.
    """

    def __init__(
        self,
        in_channel: int,
        out_channel: int,
        phase: str = "pretrain",
        use_bn: bool | None = False,
        init_cfg: dict[str, Any] | list[dict[str, Any]] | None = None,
    ) -> None:
        super().__init__(init_cfg)
        check_channels(in_channel=in_channel, out_channel=out_channel)
        self.encoder = convolutions([in_channel, in_channel, out_channel, out_channel], use_bn=bool(use_bn))
        self.decoder = convolutions(
            [out_channel, out_channel, in_channel, in_channel], use_bn=bool(use_bn), transposed=True
        )
        self.phase = phase
        if phase not in PHASES:
            raise ValueError(f'phase is {phase!r}; it takes "pretrain" or "train".')

    def forward(self, x: Tensor) -> Tensor:
        """:meth:`forward_pretrain` or :meth:`forward_train`, by the phase."""
        if self.phase == "train":
            return self.forward_train(x)
        if self.phase == "pretrain":
            return self.forward_pretrain(x)
        raise ValueError(f'phase is {self.phase}; it takes "pretrain" or "train".')

    def forward_train(self, x: Tensor) -> Tensor:
        """Features ``[N, m, H, W]`` to factors, under ``no_grad``."""
        with torch.no_grad():
            factor = self.encoder(x)
        return factor

    def forward_pretrain(self, t_feat: Tensor) -> Tensor:
        """Features ``[N, m, H, W]`` to their reconstruction."""
        return self.decoder(self.encoder(t_feat))


class Translator(Connector):
    """The student's connector.

    Args:
        in_channel: the channels of the student's features.
        out_channel: the factor's channels.
        use_bn: batch norm after every convolution; on by default, unlike the paraphraser's.
        init_cfg: mmengine's, acted upon by :meth:`init_weights`.

    Keys: ``encoder.{0,3,6}.*`` and, with batch norm, ``encoder.{1,4,7}.*``.
    """

    def __init__(
        self,
        in_channel: int,
        out_channel: int,
        use_bn: bool | None = True,
        init_cfg: dict[str, Any] | list[dict[str, Any]] | None = None,
    ) -> None:
        super().__init__(init_cfg)
        check_channels(in_channel=in_channel, out_channel=out_channel)
        self.encoder = convolutions([in_channel, in_channel, out_channel, out_channel], use_bn=bool(use_bn))

    def forward(self, feature: Tensor) -> Tensor:
        """Features ``[N, in_channel, H, W]`` to factors ``[N, out_channel, H, W]``."""
        return self.forward_train(feature)

    def forward_train(self, x: Tensor) -> Tensor:
        """What :meth:`forward` calls."""
        return self.encoder(x)
