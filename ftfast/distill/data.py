"""Labelled images as tensors on the device, and the order in which they are drawn."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ftfast.distill.errors import SettingsError

_SPLIT_SEED = 0


@dataclass(frozen=True)
class Split:
    """Images ``[N, C, H, W]`` float32, normalised, channels_last, and labels ``[N]`` int64, on one device."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device) -> "Split":
        images = self.images.to(device, memory_format=torch.channels_last)
        return Split(images, self.labels.to(device))

    def cut(self, count: int) -> tuple["Split", "Split"]:
        """``count`` images with every class in proportion, the same ones at every call, and the rest.

        Raises:
            SettingsError: fewer images than classes in either part.
        """
        from sklearn.model_selection import train_test_split

        labels = self.labels.cpu().numpy()
        classes = len(np.unique(labels))
        if count == len(self):
            return self, Split(self.images[:0], self.labels[:0])
        if not classes <= count <= len(self) - classes:
            raise SettingsError(
                f"{count} of {len(self)} images cannot hold every class on both sides of the cut; "
                f"take {classes} to {len(self) - classes}."
            )
        chosen, rest = train_test_split(
            np.arange(len(self)), train_size=count, stratify=labels, random_state=_SPLIT_SEED
        )
        return self._at(chosen), self._at(rest)

    def folds(self, count: int) -> list[tuple["Split", "Split"]]:
        """``count`` ways to cut the images, classes in proportion: those to fit on and those to validate on.

        Every image is in one validation part. The cuts are the same at every call.
        """
        from sklearn.model_selection import StratifiedKFold

        labels = self.labels.cpu().numpy()
        cuts = StratifiedKFold(count, shuffle=True, random_state=_SPLIT_SEED).split(labels, labels)
        return [(self._at(fitted), self._at(validated)) for fitted, validated in cuts]

    def _at(self, indices: np.ndarray) -> "Split":
        rows = torch.from_numpy(np.sort(indices)).to(self.labels.device)
        return Split(self.images[rows], self.labels[rows])


@dataclass(frozen=True)
class Dataset:
    """What the recipes need to know about a data set, and how to get it."""

    title: str
    classes: int
    image_shape: tuple[int, int, int]
    train_images: int
    test_images: int
    load: Callable[[], tuple[Split, Split]]


def _load_digits() -> tuple[Split, Split]:
    """1797 handwritten digits of 8x8 pixels that come with scikit-learn: 1000 to train, 797 to test."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.from_numpy(digits.images).float().unsqueeze(1) / 16
    train, test = Split(images, torch.from_numpy(digits.target).long()).cut(1000)
    mean, deviation = train.images.mean(), train.images.std()
    train, test = (Split((part.images - mean) / deviation, part.labels) for part in (train, test))
    return train, test


DATASETS = {
    "digits": Dataset("handwritten digits of scikit-learn, 8x8 pixels", 10, (1, 8, 8), 1000, 797, _load_digits),
}


def load(name: str, device: torch.device) -> tuple[Split, Split]:
    """The train and test images of a data set, on the device."""
    train, test = DATASETS[name].load()
    return train.to(device), test.to(device)


def steps_per_epoch(split: Split, batch_size: int) -> int:
    """How many batches :func:`draw_batches` draws."""
    return math.ceil(len(split) / batch_size)


def draw_batches(split: Split, batch_size: int, *, seed: int, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Every image once, in an order that seed and epoch alone decide, so that a resumed epoch draws what it would have.

    The batches are of nearly equal size, at most ``batch_size``: a last batch of one image would upset batch norms.
    """
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    order = torch.randperm(len(split), generator=generator).to(split.labels.device)
    for rows in order.tensor_split(steps_per_epoch(split, batch_size)):
        yield split.images[rows].contiguous(memory_format=torch.channels_last), split.labels[rows]
