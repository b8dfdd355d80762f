"""ResNets for small images: section 4.2 of He, Zhang, Ren and Sun, "Deep Residual Learning", CVPR 2016.

A 3x3 convolution, three stages of n basic blocks whose channels double and whose strides are 1, 2, 2, global average
pooling and a linear classifier: 6n + 2 layers.
"""

import torch.nn.functional as F
from torch import Tensor, nn

SHORTCUTS = ("identity", "projection")


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut; ``identity`` is the paper's option A, ``projection`` its option B."""

    def __init__(self, in_channels: int, channels: int, stride: int, shortcut: str) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride=stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)
        self.stride = stride
        self.added_channels = channels - in_channels
        self.projection: nn.Module | None = None
        if shortcut == "projection" and (stride != 1 or self.added_channels):
            self.projection = nn.Sequential(
                nn.Conv2d(in_channels, channels, 1, stride=stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        """``[N, in_channels, H, W]`` to ``[N, channels, ceil(H / stride), ceil(W / stride)]``."""
        out = F.relu(self.norm1(self.conv1(x)))
        out = self.norm2(self.conv2(out))
        return F.relu(out + self._shortcut(x))

    def _shortcut(self, x: Tensor) -> Tensor:
        if self.projection is not None:
            return self.projection(x)
        if self.stride != 1:
            x = x[:, :, :: self.stride, :: self.stride]
        return F.pad(x, (0, 0, 0, 0, 0, self.added_channels)) if self.added_channels else x


class ResNet(nn.Module):
    """A ResNet of ``depth = 6n + 2`` layers.

    Args:
        depth: 8, 14, 20, 26, 32, ...
        channels: of the first stage; the stages have 1, 2 and 4 times as many.
        in_channels: of the images.
        classes: the number of logits.
        shortcut: ``"identity"`` (subsampled and padded with zero channels) or ``"projection"`` (1x1 convolutions).
    """

    def __init__(self, depth: int, channels: int, *, in_channels: int, classes: int, shortcut: str) -> None:
        super().__init__()
        blocks = (depth - 2) // 6
        self.stem = nn.Conv2d(in_channels, channels, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(channels)
        self.stage1 = _stage(blocks, channels, channels, 1, shortcut)
        self.stage2 = _stage(blocks, channels, 2 * channels, 2, shortcut)
        self.stage3 = _stage(blocks, 2 * channels, 4 * channels, 2, shortcut)
        self.classifier = nn.Linear(4 * channels, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        """Images ``[N, in_channels, H, W]`` to logits ``[N, classes]``."""
        x = F.relu(self.norm(self.stem(images)))
        x = self.stage3(self.stage2(self.stage1(x)))
        return self.classifier(x.mean((2, 3)))


def _stage(blocks: int, in_channels: int, channels: int, stride: int, shortcut: str) -> nn.Sequential:
    first = BasicBlock(in_channels, channels, stride, shortcut)
    return nn.Sequential(first, *(BasicBlock(channels, channels, 1, shortcut) for _ in range(blocks - 1)))
