"""Labelled images as tensors on the device, and the order in which they are drawn."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ftfast.distill.data import datasets
from ftfast.distill.data.augment import Augmentation
from ftfast.distill.data.cuts import cut_rows, fold_rows
from ftfast.distill.data.images import size_of, steps_of
from ftfast.distill.runtime.processes import WHOLE, Part


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
class Split:
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
        """Batches of every image once: images ``[N, C, H, W]`` float32, channels_last, and labels.

        See :meth:`ftfast.distill.data.images.Images.draw`.
        """
        device, augmentation = self.labels.device, self.augmentation
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        order = torch.randperm(len(self), generator=generator)
        draws = None
        if augmentation:
            height, width = self.pixels.shape[2:]
            draws = augmentation.draw(len(self), (height, width), generator, device)
        start = 0
        for step, whole in enumerate(order.to(device).tensor_split(steps_of(len(self), batch_size))):
            first = start + sum(size_of(len(whole), part.ranks, rank) for rank in range(part.rank))
            start += len(whole)
            if step < first_step:
                continue
            rows = whole.tensor_split(part.ranks)[part.rank]
            drawn = slice(first, first + len(rows))
            if draws is None:
                images = self.normalise(self.pixels[rows])
            else:
                images = self.normalise(augmentation.crop(self.pixels, rows, draws.at(drawn)))
                images = augmentation.blank(images, draws.at(drawn))
            yield images, self.labels[rows]

    def in_order(self, batch_size: int, part: Part = WHOLE) -> Iterator[tuple[Tensor, Tensor]]:
        """Every image once and as it is, with its label, in the order of the split; of several processes, its own."""
        own = (values.tensor_split(part.ranks)[part.rank] for values in (self.pixels, self.labels))
        for pixels, labels in zip(*(values.split(batch_size) for values in own), strict=True):
            if len(labels):
                yield self.normalise(pixels), labels

    def to(self, device: torch.device) -> "Split":
        pixels = self.pixels.to(device).contiguous(memory_format=torch.channels_last)
        normalisation = None if self.normalisation is None else self.normalisation.to(device)
        return replace(self, pixels=pixels, labels=self.labels.to(device), normalisation=normalisation)

    def damaged(self) -> int:
        """None: there are no files."""
        return 0

    def bear_damage(self, count: int) -> None:
        """There is none."""

    def close(self) -> None:
        """Nothing reads ahead."""

    def cut(self, count: int) -> tuple["Split", "Split"]:
        """``count`` images with every class in proportion, the same ones at every call, and the rest.

        Raises:
            SettingsError: fewer images than classes in either part.
        """
        if count == len(self):
            return self, self.at(np.arange(0))
        chosen, rest = cut_rows(self.labels.cpu().numpy(), count)
        return self.at(chosen), self.at(rest)

    def folds(self, count: int) -> list[tuple["Split", "Split"]]:
        """``count`` ways to cut the images, classes in proportion: those to fit on and those to validate on.

        Every image is in one validation part. The cuts are the same at every call.
        """
        cuts = fold_rows(self.labels.cpu().numpy(), count)
        return [(self.at(fitted), self.at(validated)) for fitted, validated in cuts]

    def at(self, indices: np.ndarray) -> "Split":
        """Some of the images, by their rows."""
        rows = torch.from_numpy(indices).to(self.labels.device)
        return replace(self, pixels=self.pixels[rows], labels=self.labels[rows])

    def normalise(self, pixels: Tensor) -> Tensor:
        """Pixels ``[N, C, H, W]`` of the split's kind to float32, channels_last; a floating-point dtype stays."""
        images = pixels if self.normalisation is None else self.normalisation.apply(pixels)
        return images.contiguous(memory_format=torch.channels_last)


@dataclass(frozen=True)
class Source:
    """Where images come from, and what is done to those that are trained on.

    Attributes:
        folder: the data folder; None for ``$FTFAST_DATA`` or ``~/.cache/ftfast``.
        download: whether the network may be asked for what is not there.
        augmentation: of the training images.
    """

    folder: Path | None = None
    download: bool = False
    augmentation: Augmentation = field(default_factory=Augmentation)


@dataclass(frozen=True)
class Dataset:
    """What the recipes need to know about a data set, and how to get it."""

    title: str
    classes: int
    image_shape: tuple[int, int, int]
    train_images: int
    test_images: int
    load: Callable[..., tuple[Split, Split]] | None
    in_files: bool = True

    @property
    def is_streamed(self) -> bool:
        """Whether images are read as they are needed; how many and of what size is then for the settings to say."""
        return self.load is None


def _load_digits(_source: Source | None = None) -> tuple[Split, Split]:
    """1000 digits to train on, 797 to test."""
    images, labels = datasets.read_digits()
    train, test = Split(images, labels).cut(1000)
    training = train.pixels.float() / 16
    normalisation = Normalisation(16, *(value.reshape(1, 1, 1) for value in (training.mean(), training.std())))
    return replace(train, normalisation=normalisation), replace(test, normalisation=normalisation)


def _load_files(
    read: Callable[..., tuple[datasets.Labelled, datasets.Labelled]], normalisation: Normalisation, source: Source
) -> tuple[Split, Split]:
    train, test = read(source.folder or datasets.default_folder(), source.download)
    return Split(*train, normalisation=normalisation), Split(*test, normalisation=normalisation)


# Mean and deviation of the training images; those of CIFAR-10 are the authors' code's, which its teachers were given.
DATASETS = {
    "digits": Dataset(
        "handwritten digits of scikit-learn, 8x8 pixels", 10, (1, 8, 8), 1000, 797, _load_digits, in_files=False
    ),
    "fashion-mnist": Dataset(
        "Fashion-MNIST, 28x28 pixels",
        10,
        (1, 28, 28),
        60_000,
        10_000,
        partial(_load_files, datasets.read_fashion_mnist, Normalisation.of(255, (0.2860,), (0.3530,))),
    ),
    "cifar10": Dataset(
        "CIFAR-10, 32x32 pixels",
        10,
        (3, 32, 32),
        50_000,
        10_000,
        partial(
            _load_files,
            datasets.read_cifar10,
            Normalisation.of(255, (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
        ),
    ),
    "cifar100": Dataset(
        "CIFAR-100, 32x32 pixels",
        100,
        (3, 32, 32),
        50_000,
        10_000,
        partial(
            _load_files,
            datasets.read_cifar100,
            Normalisation.of(255, (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
        ),
    ),
    "images": Dataset("photographs", 0, (3, 0, 0), 0, 0, None),
}


def described_dataset(name: str, photographs: dict[str, int] | None = None) -> Dataset:
    """A data set by name.

    Args:
        photographs: of ``"images"``: their classes, their side in pixels (``"size"``), and where they are known the
            numbers of images (``"train"``, ``"test"``).
    """
    known = DATASETS[name]
    if not known.is_streamed or photographs is None:
        return known
    size = photographs["size"]
    return replace(
        known,
        title=f"photographs of {photographs['classes']} classes, {size}x{size} pixels",
        classes=photographs["classes"],
        image_shape=(3, size, size),
        train_images=photographs.get("train", 0),
        test_images=photographs.get("test", 0),
    )


def check_files(name: str, source: Source) -> None:
    """Raises DataError where a data set's files are not there and are not to be downloaded; reads nothing."""
    if DATASETS[name].in_files and not DATASETS[name].is_streamed:
        datasets.check_is_there(name, source.folder or datasets.default_folder(), source.download)


def load(name: str, device: torch.device, source: Source | None = None) -> tuple[Split, Split]:
    """The train and test images of a data set, on the device; the former with the source's augmentation.

    Raises:
        DataError: its files are not there, damaged, or cannot be downloaded.
    """
    dataset, source = DATASETS[name], source or Source()
    assert dataset.load is not None
    train, test = dataset.load(source) if dataset.in_files else dataset.load()
    if (len(train), len(test)) != (dataset.train_images, dataset.test_images):
        folder = source.folder or datasets.default_folder()
        raise datasets.DataError(
            f"{name} in {folder} has {len(train)} training and {len(test)} test images, not {dataset.train_images} "
            f"and {dataset.test_images}; remove its files there and run again with --download."
        )
    return replace(train, augmentation=source.augmentation).to(device), test.to(device)
