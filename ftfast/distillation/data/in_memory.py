"""Labelled images as tensors on the device, and the order in which they are drawn."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from ftfast.distillation.data.augment import Augmentation
from ftfast.distillation.data.images import Images, epoch_generator, steps_of
from ftfast.distillation.runtime.processes import WHOLE, Part

# Pixels that a GPU augments together: of many batches, since each launch costs as much as the work of a small one.
_PIXELS_AT_ONCE = 2**24


def _steps_at_once(device: torch.device, pixels: int) -> int:
    """How many batches of so many pixels are made together; on a CPU one, which its caches hold."""
    return 1 if device.type == "cpu" else max(1, _PIXELS_AT_ONCE // max(1, pixels))


@dataclass(frozen=True)
class Normalisation:
    """Pixels to numbers: ``(pixels / scale - mean) / deviation``, the latter ``[C, 1, 1]`` float32."""

    scale: float
    mean: Tensor
    deviation: Tensor

    @classmethod
    def of(cls, scale: float, mean: tuple[float, ...], deviation: tuple[float, ...]) -> "Normalisation":
        """The one with these numbers, one a channel."""
        return cls(scale, *(torch.tensor(values).reshape(-1, 1, 1) for values in (mean, deviation)))

    def to(self, device: torch.device) -> "Normalisation":
        return Normalisation(self.scale, self.mean.to(device), self.deviation.to(device))

    def apply(self, pixels: Tensor) -> Tensor:
        """``[N, C, H, W]`` of any dtype to float32, in the same memory format."""
        return pixels.float().div_(self.scale).sub_(self.mean).div_(self.deviation)


@dataclass(frozen=True)
class Split(Images):
    """Labelled images on one device.

    Attributes:
        pixels: ``[N, C, H, W]``, uint8; or floating-point and normalised already, where there is no normalisation.
        labels: ``[N]`` int64.
        normalisation: applied to every batch.
        augmentation: applied to the batches of :meth:`draw` alone.
    """

    pixels: Tensor
    labels: Tensor
    normalisation: Normalisation | None = None
    augmentation: Augmentation = field(default_factory=Augmentation)

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def images(self) -> Tensor:
        """All of them as the models take them: ``[N, C, H, W]`` float32, normalised, channels_last; made at each call.

        For one part after the other see :meth:`in_order`.
        """
        return self.normalise(self.pixels)

    @property
    def test_batch_size(self) -> int:
        return 1000

    def draw(
        self, batch_size: int, *, seed: int, epoch: int, first_step: int = 0, part: Part = WHOLE
    ) -> Iterator[tuple[Tensor, ...]]:
        device, augmentation = self.labels.device, self.augmentation
        generator = epoch_generator(seed, epoch)
        order = torch.randperm(len(self), generator=generator)
        draws = None
        if augmentation:
            height, width = self.pixels.shape[2:]
            draws = augmentation.draw(len(self), (height, width), generator, device)
        wholes = torch.arange(len(self)).tensor_split(steps_of(len(self), batch_size))[first_step:]
        if not wholes:
            return
        own = [whole.tensor_split(part.ranks)[part.rank] for whole in wholes]
        places, sizes = torch.cat(own), [len(batch) for batch in own]
        rows = order[places].to(device)
        draws = None if draws is None else draws.at(places.to(device))
        at_once = _steps_at_once(device, sizes[0] * self.pixels[0].numel())
        start = 0
        for step in range(0, len(sizes), at_once):
            of_steps = sizes[step : step + at_once]
            drawn = slice(start, start + sum(of_steps))
            start = drawn.stop
            if draws is None:
                images = self.normalise(self.pixels[rows[drawn]])
            else:
                images = self.normalise(augmentation.crop(self.pixels, rows[drawn], draws.at(drawn)))
                images = augmentation.blank(images, draws.at(drawn))
            yield from zip(images.split(of_steps), self.labels[rows[drawn]].split(of_steps), strict=True)

    def in_order(self, batch_size: int, part: Part = WHOLE) -> Iterator[tuple[Tensor, Tensor]]:
        own = (values.tensor_split(part.ranks)[part.rank] for values in (self.pixels, self.labels))
        for pixels, labels in zip(*(values.split(batch_size) for values in own), strict=True):
            if len(labels):
                yield self.normalise(pixels), labels

    def to(self, device: torch.device) -> "Split":
        pixels = self.pixels.to(device).contiguous(memory_format=torch.channels_last)
        normalisation = None if self.normalisation is None else self.normalisation.to(device)
        return replace(self, pixels=pixels, labels=self.labels.to(device), normalisation=normalisation)

    def row_labels(self) -> np.ndarray:
        return self.labels.cpu().numpy()

    def at(self, rows: np.ndarray) -> "Split":
        places = torch.from_numpy(rows).to(self.labels.device)
        return replace(self, pixels=self.pixels[places], labels=self.labels[places])

    def normalise(self, pixels: Tensor) -> Tensor:
        """Pixels ``[N, C, H, W]`` of the split's kind to float32, channels_last; a floating-point dtype stays."""
        images = pixels if self.normalisation is None else self.normalisation.apply(pixels)
        return images.contiguous(memory_format=torch.channels_last)
