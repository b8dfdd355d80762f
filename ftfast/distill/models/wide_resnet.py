"""Wide ResNets for small images: Zagoruyko and Komodakis, "Wide Residual Networks", BMVC 2016, without dropout.

Three stages of n blocks that normalise before they convolve, the stages' channels 16k, 32k and 64k: 6n + 4 layers.
"""

import torch.nn.functional as F
from torch import Tensor, nn


class PreactivationBlock(nn.Module):
    """Norm, ReLU and 3x3 convolution, twice, beside a shortcut that is a 1x1 convolution where the shape changes."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride=stride, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.projection: nn.Module | None = None
        if stride != 1 or in_channels != channels:
            self.projection = nn.Conv2d(in_channels, channels, 1, stride=stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, in_channels, H, W]`` to ``[N, channels, ceil(H / stride), ceil(W / stride)]``."""
        active = F.relu(self.norm1(x))
        out = self.conv2(F.relu(self.norm2(self.conv1(active))))
        return out + (x if self.projection is None else self.projection(active))


class WideResNet(nn.Module):
    """A WRN of ``depth = 6n + 4`` layers; its last features, those that the classifier sees, are ``activation``'s.

    Args:
        depth: 10, 16, 22, 28, 40, 46, ...
        width: k.
        channels: of the first convolution, 16 in the paper; the stages have k, 2k and 4k times as many.
        in_channels: of the images.
        classes: the number of logits.
    """

    def __init__(self, depth: int, width: int, channels: int, *, in_channels: int, classes: int) -> None:
        super().__init__()
        blocks = (depth - 4) // 6
        widths = [channels * width * factor for factor in (1, 2, 4)]
        self.stem = nn.Conv2d(in_channels, channels, 3, padding=1, bias=False)
        self.stage1 = _stage(blocks, channels, widths[0], 1)
        self.stage2 = _stage(blocks, widths[0], widths[1], 2)
        self.stage3 = _stage(blocks, widths[1], widths[2], 2)
        self.norm = nn.BatchNorm2d(widths[2])
        self.activation = nn.ReLU()
        self.classifier = nn.Linear(widths[2], classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        """Images ``[N, in_channels, H, W]`` to logits ``[N, classes]``."""
        x = self.stage3(self.stage2(self.stage1(self.stem(images))))
        x = self.activation(self.norm(x))
        return self.classifier(x.mean((2, 3)))


def _stage(blocks: int, in_channels: int, channels: int, stride: int) -> nn.Sequential:
    first = PreactivationBlock(in_channels, channels, stride)
    return nn.Sequential(first, *(PreactivationBlock(channels, channels, 1) for _ in range(blocks - 1)))
