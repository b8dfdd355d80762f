"""Random crop, flip and cutout of a whole batch of uint8 images on its device, one draw for each image; and mixup,
cutmix and label smoothing of the batch as a whole, which teacher and student see alike.

Libraries draw once for a batch, or image by image in a loader's processes, for which a fast step has to wait.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ftfast.distillation.runtime.seeds import seeded


class Draws(NamedTuple):
    """The draws of N images: offsets of the crop and centre of the cutout ``[N, 2]`` (y, x) int64, flips ``[N]`` bool.

    The offsets lie in ``0..2*padding``.
    """

    offsets: Tensor
    flips: Tensor
    centres: Tensor

    def at(self, positions: slice | Tensor) -> "Draws":
        return Draws(*(drawn[positions] for drawn in self))


@dataclass(frozen=True)
class Augmentation:
    """What happens to a training image before it is normalised.

    Attributes:
        crop_padding: pixels of black around the image, out of which a part of the image's own size is cut.
        flip: mirror left and right, one image in two.
        cutout: side in pixels of a square that is blanked, its centre anywhere in the image (DeVries and Taylor 2017).
    """

    crop_padding: int = 0
    flip: bool = False
    cutout: int = 0

    def __bool__(self) -> bool:
        return bool(self.crop_padding or self.flip or self.cutout)

    def draw(self, count: int, size: tuple[int, int], generator: torch.Generator, device: torch.device) -> Draws:
        """Draws for ``count`` images of ``size`` (height, width): drawn on the CPU, so that every device has the same.

        A whole epoch's are drawn and sent at once, which no step then waits for.
        """
        offsets = torch.randint(0, 2 * self.crop_padding + 1, (count, 2), generator=generator)
        flips = torch.rand(count, generator=generator) < (0.5 if self.flip else 0.0)
        centres = (torch.rand(count, 2, generator=generator) * torch.tensor(size)).long()
        return Draws(*(drawn.to(device) for drawn in (offsets, flips, centres)))

    def crop(self, images: Tensor, rows: Tensor, draws: Draws) -> Tensor:
        """The crops and flips of ``images[rows]``; both are ``[N, C, H, W]`` of one dtype, channels_last in memory."""
        channels, height, width = images.shape[1:]
        y = _positions(height, draws.offsets[:, 0] - self.crop_padding)
        x = _positions(width, draws.offsets[:, 1] - self.crop_padding)
        x = torch.where(draws.flips[:, None], x.flip(1), x)
        inside = _within(y, height)[:, :, None] & _within(x, width)[:, None, :]
        y, x = y.clamp_(0, height - 1), x.clamp_(0, width - 1)
        lines = (rows[:, None] * height + y) * width
        pixels = images.permute(0, 2, 3, 1).reshape(-1, channels)  # no copy of channels_last images
        chosen = pixels.index_select(0, (lines[:, :, None] + x[:, None, :]).flatten()).view(*inside.shape, channels)
        return chosen.mul_(inside[..., None]).permute(0, 3, 1, 2)

    def blank(self, images: Tensor, draws: Draws) -> Tensor:
        """Normalised ``images`` with the cutout's square at 0, the mean pixel; a square reaches over the edge."""
        if not self.cutout:
            return images
        first = draws.centres - self.cutout // 2
        y, x = (
            _within(torch.arange(size, device=images.device) - first[:, axis, None], self.cutout)
            for axis, size in enumerate(images.shape[2:])
        )
        return images.masked_fill((y[:, :, None] & x[:, None, :])[:, None], 0)


def _positions(size: int, offsets: Tensor) -> Tensor:
    return torch.arange(size, device=offsets.device) + offsets[:, None]


def _within(positions: Tensor, size: int) -> Tensor:
    return (positions >= 0) & (positions < size)


class Mixing:
    """Changes a batch's images and labels; false where nothing is to be changed.

    Args:
        classes: of the labels.
        label_smoothing: share of the label that all classes get alike, as ``F.cross_entropy`` has it.
        mixup: alpha of mixup's beta distribution (Zhang et al. 2018), 0 for none.
        cutmix: alpha of cutmix's (Yun et al. 2019), 0 for none; of both, each batch draws one.
    """

    def __init__(self, classes: int, label_smoothing: float = 0.0, mixup: float = 0.0, cutmix: float = 0.0) -> None:
        self._classes = classes
        self._smoothing = label_smoothing
        self._mixup, self._cutmix = float(mixup), float(cutmix)

    def __bool__(self) -> bool:
        return bool(self._smoothing or self._mixup or self._cutmix)

    def __call__(self, images: Tensor, labels: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        """Images ``[N, C, H, W]``, channels_last as they came, and labels ``[N, classes]`` float32.

        Args:
            labels: ``[N]`` int64.
            seed: decides what is drawn; torch's own random state stays as it was.
        """
        if not self:
            return images, labels
        mixed = F.one_hot(labels, self._classes).float()
        if self._mixup or self._cutmix:
            with seeded(seed):
                images, mixed = self._mix(images, labels)
            images = images.contiguous(memory_format=torch.channels_last)
        return images, mixed * (1 - self._smoothing) + self._smoothing / self._classes

    def _mix(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        from torchvision.transforms import v2

        kinds = []
        if self._mixup:
            kinds.append(v2.MixUp(alpha=self._mixup, num_classes=self._classes))
        if self._cutmix:
            kinds.append(v2.CutMix(alpha=self._cutmix, num_classes=self._classes))
        chosen = int(torch.randint(len(kinds), ())) if len(kinds) > 1 else 0
        return kinds[chosen](images, labels)
