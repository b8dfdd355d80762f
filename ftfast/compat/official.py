"""Jangho-Kim/Factor-Transfer-pytorch, the authors' code: ``Models/FeatureProjection.py`` and the loss of its training
script.

``from ftfast.compat.official import *`` below its ``from Models import *`` takes the networks from here, and in
``train_student.py`` the loss line becomes ``loss = factor_transfer_loss(factor_s, factor_t, BETA) + ...``. The scripts
say ``utils.FT``, which they may keep: these networks' outputs are laid out as torch's.
"""

import torch
from torch import Tensor, nn

from ftfast.compat.directions import EPS, direction
from ftfast.compat.networks import NEGATIVE_SLOPE, PeerNetwork, check_channels, convolve, laid_out_as_torch
from ftfast.ops.ft_loss.function import run

__all__ = ["FT", "Paraphraser", "Translator", "factor_transfer_loss"]

RECONSTRUCTION, FACTOR, DECODING = 0, 1, 2


def _through(x: Tensor, layers: list[nn.Module], activation: nn.LeakyReLU) -> Tensor:
    y = x
    for layer in layers:
        fused = convolve(y, layer, activation)
        y = activation(layer(y)) if fused is None else fused
    return laid_out_as_torch(y, x, layers)


class Paraphraser(PeerNetwork):
    """Three convolutions and three transposed ones, LeakyReLU(0.1) after each.

    Args:
        in_planes: m, the channels of the teacher's features.
        planes: the factor's channels, ``int(round(m * k))`` in the authors' scripts.
        stride: taken and ignored, as there; every convolution has stride 1.

    Keys: ``conv{0,1,2}.*`` and ``deconv{0,1,2}.*``.
    """

    def __init__(self, in_planes: int, planes: int, stride: int = 1) -> None:
        super().__init__()
        check_channels(in_planes=in_planes, planes=planes)
        self.leakyrelu = nn.LeakyReLU(NEGATIVE_SLOPE)
        self.conv0 = nn.Conv2d(in_planes, in_planes, 3, padding=1)
        self.conv1 = nn.Conv2d(in_planes, planes, 3, padding=1)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1)
        self.deconv0 = nn.ConvTranspose2d(planes, planes, 3, padding=1)
        self.deconv1 = nn.ConvTranspose2d(planes, in_planes, 3, padding=1)
        self.deconv2 = nn.ConvTranspose2d(in_planes, in_planes, 3, padding=1)

    def forward(self, x: Tensor, mode: int) -> Tensor:
        """By ``mode``: 0 the reconstruction of features, 1 their factor, 2 the features decoded from a factor.

        Raises:
            ValueError: another mode.
        """
        encoder: list[nn.Module] = [self.conv0, self.conv1, self.conv2]
        decoder: list[nn.Module] = [self.deconv0, self.deconv1, self.deconv2]
        stages: dict[int, list[nn.Module]] = {RECONSTRUCTION: encoder + decoder, FACTOR: encoder, DECODING: decoder}
        if mode not in stages:
            raise ValueError(f"mode is {mode!r}; it takes 0 (reconstruction), 1 (factor) or 2 (decoder alone).")
        return _through(x, stages[mode], self.leakyrelu)


class Translator(PeerNetwork):
    """Three convolutions, LeakyReLU(0.1) after each.

    Args:
        in_planes: the channels of the student's features.
        planes: the factor's channels.
        stride: taken and ignored, as there.

    Keys: ``conv{0,1,2}.*``.
    """

    def __init__(self, in_planes: int, planes: int, stride: int = 1) -> None:
        super().__init__()
        check_channels(in_planes=in_planes, planes=planes)
        self.leakyrelu = nn.LeakyReLU(NEGATIVE_SLOPE)
        self.conv0 = nn.Conv2d(in_planes, in_planes, 3, padding=1)
        self.conv1 = nn.Conv2d(in_planes, planes, 3, padding=1)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Features ``[N, in_planes, H, W]`` to factors ``[N, planes, H, W]``."""
        if torch.jit.is_scripting():
            y = self.leakyrelu(self.conv1(self.leakyrelu(self.conv0(x))))
            return self.leakyrelu(self.conv2(y))
        else:
            return self._fused(x)

    @torch.jit.unused
    def _fused(self, x: Tensor) -> Tensor:
        return _through(x, [self.conv0, self.conv1, self.conv2], self.leakyrelu)


def FT(x: Tensor) -> Tensor:
    """``utils.FT``: factors ``[N, ...]`` to unit vectors ``[N, D]``, float32 (float64 for float64).

    For whoever needs the vectors themselves; :func:`factor_transfer_loss` is faster than ``L1Loss`` of two of them.
    """
    return direction(x)


def factor_transfer_loss(factor_student: Tensor, factor_teacher: Tensor, beta: float | Tensor = 500) -> Tensor:
    """``beta * L1Loss()(FT(factor_student), FT(factor_teacher.detach()))`` in one kernel.

    Args:
        factor_student, factor_teacher: ``[N, C, H, W]``, any strides; the teacher's gets no gradient.
        beta: the weight, 500 in the authors' CIFAR-10 script; a mean over N*C*H*W is multiplied with it.

    Returns:
        0-d, float32 or float64.

    Raises:
        TypeError, ValueError: as :func:`ftfast.ft_loss`.
    """
    teacher = factor_teacher.detach() if isinstance(factor_teacher, Tensor) else factor_teacher
    weight = float(beta) if isinstance(beta, int) else beta
    return run(factor_student, teacher, p=1, reduction="mean", eps=EPS, weight=weight, backend="auto")
