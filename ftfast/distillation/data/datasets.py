"""The data sets, each an entry of :data:`DATASETS`."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Self

import numpy as np
import torch
from torch import Tensor

from ftfast.distillation.data.in_memory import Normalisation, Split
from ftfast.distillation.data.published import Published
from ftfast.distillation.data.source import Source, default_folder
from ftfast.errors import DataError


def read_digits() -> tuple[Tensor, Tensor]:
    """1797 handwritten digits of 8x8 pixels from 0 to 16, as scikit-learn's load_digits gives them.

    Images ``[N, 1, 8, 8]`` uint8 and labels ``[N]`` int64, which come with the package; digits.txt says where from.
    """
    with np.load(Path(__file__).with_name("digits.npz"), allow_pickle=False) as digits:
        return torch.from_numpy(digits["images"]).unsqueeze(1), torch.from_numpy(digits["labels"]).long()


@dataclass(frozen=True)
class Dataset:
    """What a run needs to know of a data set, and how to get it.

    Attributes:
        title: for reports.
        image_shape: channels, height, width.
        train_images, test_images: how many.
        load: of a source, the images to train and to test on; None where they are read as they are needed.
        files: where it lies; None of one that needs no files, or whose files the settings name.
    """

    title: str
    classes: int
    image_shape: tuple[int, int, int]
    train_images: int
    test_images: int
    load: Callable[[Source], tuple[Split, Split]] | None
    files: Published | None = None

    @classmethod
    def published(
        cls, title: str, classes: int, shape: tuple[int, int, int], train: int, test: int, files: Published
    ) -> Self:
        """One in its makers' files."""
        return cls(title, classes, shape, train, test, files.load, files)

    @property
    def in_files(self) -> bool:
        """Whether it lies in the data folder."""
        return self.is_streamed or self.files is not None

    @property
    def is_streamed(self) -> bool:
        """Whether images are read as they are needed; how many and of what size is then for the settings to say."""
        return self.load is None

    def of_noise(self, images: int) -> "Dataset":
        """One of its shape and classes that shows nothing, of so many images to train on and to test on."""
        return replace(
            self,
            title=f"noise in the shape of {self.title}",
            train_images=images,
            test_images=images,
            load=partial(_load_noise, self.image_shape),
            files=None,
        )


def _load_digits(_source: Source) -> tuple[Split, Split]:
    """1000 digits to train on, 797 to test."""
    images, labels = read_digits()
    train, test = Split(images, labels).stratified(1000)
    training = train.pixels.float() / 16
    normalisation = Normalisation(16, *(value.reshape(1, 1, 1) for value in (training.mean(), training.std())))
    return replace(train, normalisation=normalisation), replace(test, normalisation=normalisation)


def _load_noise(shape: tuple[int, int, int], source: Source) -> tuple[Split, Split]:
    """Images of two classes, so that few can be parted in proportion."""
    generator = torch.Generator().manual_seed(0)
    normalisation = Normalisation.of(255, (0.5,) * shape[0], (0.29,) * shape[0])
    train, test = (
        Split(
            torch.randint(256, (source.noise_images, *shape), generator=generator, dtype=torch.uint8),
            torch.arange(source.noise_images) % 2,
            normalisation=normalisation,
        )
        for _ in range(2)
    )
    return train, test


# Of CIFAR-10 mean and deviation are those of the authors' code, which its teachers were given.
DATASETS = {
    "digits": Dataset("handwritten digits of scikit-learn, 8x8 pixels", 10, (1, 8, 8), 1000, 797, _load_digits),
    # Xiao, Rasul and Vollgraf 2017
    "fashion-mnist": Dataset.published(
        "Fashion-MNIST, 28x28 pixels",
        10,
        (1, 28, 28),
        60_000,
        10_000,
        Published("fashion-mnist", "FashionMNIST", (0.2860,), (0.3530,), ("FashionMNIST/raw",)),
    ),
    # Krizhevsky 2009, in the files of their python version
    **{
        name: Dataset.published(
            f"CIFAR-{classes}, 32x32 pixels",
            classes,
            (3, 32, 32),
            50_000,
            10_000,
            Published(name, f"CIFAR{classes}", mean, deviation, (folder, f"cifar-{classes}-python.tar.gz")),
        )
        for name, classes, mean, deviation, folder in (
            ("cifar10", 10, (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010), "cifar-10-batches-py"),
            ("cifar100", 100, (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762), "cifar-100-python"),
        )
    },
    "images": Dataset("photographs", 0, (3, 0, 0), 0, 0, None),
}


def check_files(name: str, source: Source) -> None:
    """Raises DataError where a data set's files are not there and are not to be downloaded; reads nothing."""
    if (files := DATASETS[name].files) is not None:
        files.check(source)


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


def load(name: str, device: torch.device, source: Source | None = None) -> tuple[Split, Split]:
    """The train and test images of a data set, on the device; the former with the source's augmentation.

    Raises:
        DataError: its files are not there, damaged, or cannot be downloaded.
    """
    dataset, source = DATASETS[name], source or Source()
    if source.noise_images:
        dataset = dataset.of_noise(source.noise_images)
    assert dataset.load is not None
    train, test = dataset.load(source)
    if (len(train), len(test)) != (dataset.train_images, dataset.test_images):
        folder = source.folder or default_folder()
        raise DataError(
            f"{name} in {folder} has {len(train)} training and {len(test)} test images, not {dataset.train_images} "
            f"and {dataset.test_images}; remove its files there and run again with --download."
        )
    return replace(train, augmentation=source.augmentation).to(device), test.to(device)
