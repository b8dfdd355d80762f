"""Training images cut by boxes that are given, where a store keeps them, and the drawing of such boxes.

A box is ``(top, left, height, width, flip)`` in pixels of the image, int32; of small images it may reach over the edge
by their padding.
"""

import base64
import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ftfast.distillation.data.augment import Draws
from ftfast.distillation.data.images import Images
from ftfast.distillation.data.in_memory import Split
from ftfast.distillation.data.photographs import crops
from ftfast.distillation.data.photographs.image_files import decode
from ftfast.distillation.data.photographs.streamed import Streamed
from ftfast.distillation.runtime import files
from ftfast.errors import StoreError

Batch = tuple[np.ndarray, np.ndarray]
"""Rows ``[N]`` and their boxes ``[N, 5]``."""


class ViewedImages(ABC):
    """All training images of a data set, from which boxes can be cut; rows are numbers in their order."""

    images: Images

    @property
    def labels(self) -> np.ndarray:
        """``[N]`` int64."""
        return self.images.row_labels()

    @abstractmethod
    def transform(self) -> dict[str, Any]:
        """How a box becomes what the networks take, in words and numbers."""

    @abstractmethod
    def hashes(self) -> dict[str, str]:
        """SHA-256 of transform, decoder and data."""

    @abstractmethod
    def draw(self, batches: Iterable[np.ndarray], views: int, seed: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Of each batch of rows: images ``[N * views, C, H, W]``, labels ``[N]`` and boxes ``[N, views, 5]``.

        An image's boxes follow from ``seed`` and its row alone.
        """

    @abstractmethod
    def cut(self, batches: Iterable[Batch]) -> Iterator[tuple[Tensor, ...]]:
        """Images ``[N, C, H, W]`` float32, normalised, channels_last, on their device, and labels."""


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """On the device, without waiting for the copy."""
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


@dataclass(frozen=True)
class SmallImages(ViewedImages):
    """Images in memory."""

    images: Split

    def transform(self) -> dict[str, Any]:
        augmentation, normalisation = self.images.augmentation, self.images.normalisation
        numbers = None
        if normalisation is not None:
            mean, deviation = (values.flatten().tolist() for values in (normalisation.mean, normalisation.deviation))
            numbers = {"scale": normalisation.scale, "mean": mean, "deviation": deviation}
        return {
            "cut": "crops of the padded image",
            "size": list(self.images.pixels.shape[1:]),
            "crop_padding": augmentation.crop_padding,
            "flip": augmentation.flip,
            "normalisation": numbers,
        }

    def hashes(self) -> dict[str, str]:
        data = files.hash_tensors({"pixels": self.images.pixels, "labels": self.images.labels})
        return {"transform": files.hash_json(self.transform()), "decoder": files.hash_json("none"), "data": data}

    @property
    def different_views(self) -> int:
        """How many boxes an image has."""
        augmentation = self.images.augmentation
        return (2 * augmentation.crop_padding + 1) ** 2 * (2 if augmentation.flip else 1)

    def draw(self, batches: Iterable[np.ndarray], views: int, seed: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """No two boxes of an image are alike."""
        if views > self.different_views:
            augmentation = self.images.augmentation
            raise StoreError(
                f"views is {views}, and with crop_padding {augmentation.crop_padding} and flip "
                f"{'on' if augmentation.flip else 'off'} an image has {self.different_views}; give --views "
                f"{self.different_views} or fewer."
            )
        for rows in batches:
            boxes = np.stack([self._boxes(int(row), views, seed) for row in rows])
            images, labels = self._cut(np.repeat(rows, views), boxes.reshape(-1, 5))
            yield images, labels[::views], torch.from_numpy(boxes)

    def _boxes(self, row: int, views: int, seed: int) -> np.ndarray:
        generator = torch.Generator().manual_seed(crops.sample_seed(seed, 0, row))
        chosen = torch.randperm(self.different_views, generator=generator)[:views].numpy()
        padding, (height, width) = self.images.augmentation.crop_padding, self.images.pixels.shape[2:]
        side = 2 * padding + 1
        top, left, flip = chosen % side - padding, chosen // side % side - padding, chosen // side**2
        sizes = np.broadcast_to([height, width], (views, 2))
        return np.column_stack([top, left, sizes, flip]).astype(np.int32)

    def cut(self, batches: Iterable[Batch]) -> Iterator[tuple[Tensor, ...]]:
        for rows, boxes in batches:
            yield self._cut(rows, boxes)

    def _cut(self, rows: np.ndarray, boxes: np.ndarray) -> tuple[Tensor, Tensor]:
        device = self.images.labels.device
        place = sent(torch.from_numpy(rows), device)
        if not self.images.augmentation:
            return self.images.normalise(self.images.pixels[place]), self.images.labels[place]
        given = sent(torch.from_numpy(boxes).long(), device)
        offsets = given[:, :2] + self.images.augmentation.crop_padding
        draws = Draws(offsets, given[:, 4].bool(), torch.zeros_like(offsets))
        return self.images.normalise(self.images.augmentation.crop(self.images.pixels, place, draws)), (
            self.images.labels[place]
        )


# Two slopes of colour with a bright corner, 16x16 pixels: what a decoder makes of it names the decoder.
_KNOWN_JPEG = base64.b64decode(
    "/9j/4AAQSkZJRgABAQAAAQABAAD/2wBDABsSFBcUERsXFhceHBsgKEIrKCUlKFE6PTBCYFVlZF9VXVtqeJmBanGQc1tdhbWGkJ6j"
    "q62rZ4C8ybqmx5moq6T/2wBDARweHigjKE4rK06kbl1upKSkpKSkpKSkpKSkpKSkpKSkpKSkpKSkpKSkpKSkpKSkpKSkpKSkpKSk"
    "pKSkpKSkpKT/wAARCAAQABADASIAAhEBAxEB/8QAFgABAQEAAAAAAAAAAAAAAAAABAAD/8QAFRABAQAAAAAAAAAAAAAAAAAAAgD/"
    "xAAVAQEBAAAAAAAAAAAAAAAAAAABA//EABkRAAIDAQAAAAAAAAAAAAAAAAADBBETIf/aAAwDAQACEQMRAD8ASlESpKxSosZpXAix"
    "aP/Z"
)


@dataclass(frozen=True)
class PhotographViews(ViewedImages):
    """Photographs that are decoded as they are needed.

    Attributes:
        folder: of the data, which their names in the listing leave out.
    """

    images: Streamed
    folder: Path

    def transform(self) -> dict[str, Any]:
        colours = self.images.reading.colours._asdict()
        return {
            "cut": "torchvision's RandomResizedCrop and flip",
            "size": [3, self.images.reading.size, self.images.reading.size],
            "scale": list(crops.SCALE),
            "ratio": list(crops.RATIO),
            "resize": "bilinear, antialias",
            "normalisation": {"scale": 255, **{name: list(values) for name, values in colours.items()}},
        }

    def hashes(self) -> dict[str, str]:
        names, prefix = self.images.photographs.files, f"{self.folder}/"
        data = hashlib.sha256()
        for row in self.images.rows.tolist():
            data.update(os.fsencode(names.name(row).removeprefix(prefix)) + b"\n")
        data.update(self.labels.tobytes())
        # The pixels that a known file becomes: a new version of the same decoder changes nothing.
        known = decode(torch.frombuffer(bytearray(_KNOWN_JPEG), dtype=torch.uint8))
        return {
            "transform": files.hash_json(self.transform()),
            "decoder": hashlib.sha256(known.numpy().tobytes()).hexdigest(),
            "data": data.hexdigest(),
        }

    def draw(self, batches: Iterable[np.ndarray], views: int, seed: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """A photograph's boxes are those that an epoch of the number would draw."""
        keys = ([crops.Views(row, seed, views) for row in self.images.rows[rows].tolist()] for rows in batches)
        for images, labels, *boxes in self.images.read("views", lambda: keys, len(self.images)):
            yield images, labels, boxes[0]
        if damaged := self.images.damaged():
            self.images.check_damage_limit(damaged)

    def cut(self, batches: Iterable[Batch]) -> Iterator[tuple[Tensor, ...]]:
        keys = (
            [
                crops.Cut(row, crops.Box(top, left, height, width, flip=bool(flip)))
                for row, (top, left, height, width, flip) in zip(
                    self.images.rows[rows].tolist(), boxes.tolist(), strict=True
                )
            ]
            for rows, boxes in batches
        )
        return self.images.read("draw", lambda: keys, len(self.images))


def viewed(images: Images, folder: str | Path | None) -> ViewedImages:
    """The training images of a data set, to be cut by boxes.

    Args:
        folder: of photographs.

    Raises:
        StoreError: images that are not drawn as boxes.
    """
    if isinstance(images, Split):
        return SmallImages(images)
    if not isinstance(images, Streamed):
        raise StoreError(
            "loader is 'synthetic', whose images are noise; a factor store takes --loader folder or webdataset."
        )
    if images.reading.on_device:
        raise StoreError(
            "loader is 'gpu', whose decoder differs from device to device; a factor store takes --loader folder or "
            "webdataset."
        )
    if images.reading.rand_augment:
        raise StoreError(
            "rand_augment is given, and a stored view is a box and a flip alone; leave --rand-augment out."
        )
    assert folder is not None
    return PhotographViews(images, Path(folder))
