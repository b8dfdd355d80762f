"""Random crop, flip and cutout of a whole batch of uint8 images on its device, one draw for each image.

Libraries draw once for a batch, or image by image in a loader's processes, for which a fast step has to wait.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class Draws(NamedTuple):
    """The draws of N images: offsets of the crop and centre of the cutout ``[N, 2]`` (y, x) int64, flips ``[N]`` bool.

    The offsets lie in ``0..2*padding``.
    """

    offsets: Tensor
    flips: Tensor
    centres: Tensor

    def at(self, positions: slice) -> "Draws":
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
