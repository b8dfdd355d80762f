"""VGG for small images: Simonyan and Zisserman, "Very Deep Convolutional Networks", ICLR 2015, table 1.

Batch norm after every convolution and one linear classifier in place of three, as is usual for CIFAR.
"""

from torch import Tensor, nn

# Convolutions in each of the five stages, whose channels are 1, 2, 4, 8 and 8 times those of the first.
STAGES = {11: (1, 1, 2, 2, 2), 13: (2, 2, 2, 2, 2), 16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}
_WIDTHS = (1, 2, 4, 8, 8)


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
        counts, widths = STAGES[depth], [in_channels, *(channels * width for width in _WIDTHS)]
        self.stage1 = _stage(counts[0], widths[0], widths[1])
        self.stage2 = _stage(counts[1], widths[1], widths[2])
        self.stage3 = _stage(counts[2], widths[2], widths[3])
        self.stage4 = _stage(counts[3], widths[3], widths[4])
        self.stage5 = _stage(counts[4], widths[4], widths[5])
        self.classifier = nn.Linear(widths[5], classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        """Images ``[N, in_channels, H, W]`` to logits ``[N, classes]``."""
        x = self.pool(self.stage1(images))
        x = self.pool(self.stage2(x))
        x = self.pool(self.stage3(x))
        x = self.pool(self.stage4(x))
        return self.classifier(self.pool(self.stage5(x)).mean((2, 3)))


def _stage(count: int, in_channels: int, channels: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for _ in range(count):
        # The bias does nothing before a batch norm; published checkpoints have it.
        layers += [nn.Conv2d(in_channels, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.ReLU()]
        in_channels = channels
    return nn.Sequential(*layers)
