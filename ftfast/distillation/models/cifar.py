"""Networks for small images: the paper's families on CIFAR, which no library has.

ResNet: He, Zhang, Ren and Sun, "Deep Residual Learning", CVPR 2016, section 4.2. A 3x3 convolution, three stages of n
basic blocks whose channels double and whose strides are 1, 2, 2, global average pooling and a linear classifier: 6n + 2
layers. VGG: Simonyan and Zisserman, "Very Deep Convolutional Networks", ICLR 2015, table 1, with batch norm after every
convolution and one linear classifier in place of three, as is usual for CIFAR. Wide ResNet: Zagoruyko and Komodakis,
"Wide Residual Networks", BMVC 2016, without dropout: three stages of n blocks that normalise before they convolve, the
stages' channels 16k, 32k and 64k: 6n + 4 layers.
"""

from collections.abc import Callable
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

SHORTCUTS = ("identity", "projection")


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


def _stage(block: Callable[..., nn.Module], blocks: int, in_channels: int, channels: int, stride: int) -> nn.Sequential:
    first = block(in_channels, channels, stride)
    return nn.Sequential(first, *(block(channels, channels, 1) for _ in range(blocks - 1)))


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
        block = partial(BasicBlock, shortcut=shortcut)
        self.stage1 = _stage(block, blocks, channels, channels, 1)
        self.stage2 = _stage(block, blocks, channels, 2 * channels, 2)
        self.stage3 = _stage(block, blocks, 2 * channels, 4 * channels, 2)
        self.classifier = nn.Linear(4 * channels, classes)
        self.apply(_initialise)

    def forward(self, images: Tensor) -> Tensor:
        """Images ``[N, in_channels, H, W]`` to logits ``[N, classes]``."""
        x = F.relu(self.norm(self.stem(images)))
        x = self.stage3(self.stage2(self.stage1(x)))
        return self.classifier(x.mean((2, 3)))


# Convolutions in each of the five stages, whose channels are 1, 2, 4, 8 and 8 times those of the first.
VGG_STAGES = {11: (1, 1, 2, 2, 2), 13: (2, 2, 2, 2, 2), 16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}
_VGG_WIDTHS = (1, 2, 4, 8, 8)


class VGG(nn.Module):
    """A VGG of ``depth`` layers in the paper's count.

    Its last features are ``stage5``'s: the last convolution's activations, 512 channels, before the last pooling;
    2x2 of a 32x32 image.

    Args:
        depth: 11, 13, 16 or 19.
        channels: of the first stage, 64 in the paper.
        in_channels: of the images.
        classes: the number of logits.
    """

    def __init__(self, depth: int, channels: int, *, in_channels: int, classes: int) -> None:
        super().__init__()
        # Rounded up, as images of less than 32 pixels would have no last map otherwise.
        self.pool = nn.MaxPool2d(2, ceil_mode=True)
        counts, widths = VGG_STAGES[depth], [in_channels, *(channels * width for width in _VGG_WIDTHS)]
        self.stage1 = _plain_stage(counts[0], widths[0], widths[1])
        self.stage2 = _plain_stage(counts[1], widths[1], widths[2])
        self.stage3 = _plain_stage(counts[2], widths[2], widths[3])
        self.stage4 = _plain_stage(counts[3], widths[3], widths[4])
        self.stage5 = _plain_stage(counts[4], widths[4], widths[5])
        self.classifier = nn.Linear(widths[5], classes)
        self.apply(_initialise)

    def forward(self, images: Tensor) -> Tensor:
        """Images ``[N, in_channels, H, W]`` to logits ``[N, classes]``."""
        x = self.pool(self.stage1(images))
        x = self.pool(self.stage2(x))
        x = self.pool(self.stage3(x))
        x = self.pool(self.stage4(x))
        return self.classifier(self.pool(self.stage5(x)).mean((2, 3)))


def _plain_stage(count: int, in_channels: int, channels: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for _ in range(count):
        # The bias does nothing before a batch norm; published checkpoints have it.
        layers += [nn.Conv2d(in_channels, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.ReLU()]
        in_channels = channels
    return nn.Sequential(*layers)


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
        self.stage1 = _stage(PreactivationBlock, blocks, channels, widths[0], 1)
        self.stage2 = _stage(PreactivationBlock, blocks, widths[0], widths[1], 2)
        self.stage3 = _stage(PreactivationBlock, blocks, widths[1], widths[2], 2)
        self.norm = nn.BatchNorm2d(widths[2])
        self.activation = nn.ReLU()
        self.classifier = nn.Linear(widths[2], classes)
        self.apply(_initialise)

    def forward(self, images: Tensor) -> Tensor:
        """Images ``[N, in_channels, H, W]`` to logits ``[N, classes]``."""
        x = self.stage3(self.stage2(self.stage1(self.stem(images))))
        x = self.activation(self.norm(x))
        return self.classifier(x.mean((2, 3)))
