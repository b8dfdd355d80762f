"""The data sets, each an entry of :data:`DATASETS`; public ones are read by torchvision out of the data folder.

Nothing is fetched over the network unless ``download`` asks for it.
"""

import gzip
import os
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any
from urllib.error import URLError

import numpy as np
import torch
from torch import Tensor

from ftfast.distillation.data.augment import Augmentation
from ftfast.distillation.data.in_memory import Normalisation, Split
from ftfast.errors import DistillError
from ftfast.user_folder import user_folder

DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")


class DataError(DistillError):
    """A data set that is not there, cannot be downloaded, or is not as its makers published it."""

    is_final = False  # a file system comes back, and so does a process that read for want of memory


def default_folder() -> Path:
    """Where data sets lie: ``$FTFAST_DATA``, else the user's folder.

    Raises:
        DataError: there is neither.
    """
    folder = Path(given) if (given := os.environ.get("FTFAST_DATA")) else user_folder()
    if folder is None:
        raise DataError("there is no home folder with data; give --data-dir, or set FTFAST_DATA to a folder.")
    return folder


def check_files(name: str, source: "Source") -> None:
    """Raises DataError where a data set's files are not there and are not to be downloaded; reads nothing."""
    places = DATASETS[name].places
    if (
        not places
        or source.download
        or source.noise_images
        or (name == "fashion-mnist" and DEBIAN_FASHION_MNIST.is_dir())
    ):
        return
    folder = source.folder or default_folder()
    if not any((folder / place).exists() for place in places):
        raise DataError(
            f"{name} is not in {folder}; give --download to fetch it, or --data-dir with the folder that holds "
            f"{places[0]}."
        )


def read_digits() -> tuple[Tensor, Tensor]:
    """1797 handwritten digits of 8x8 pixels from 0 to 16, as scikit-learn's load_digits gives them.

    Images ``[N, 1, 8, 8]`` uint8 and labels ``[N]`` int64, which come with the package; digits.txt says where from.
    """
    with np.load(Path(__file__).with_name("digits.npz"), allow_pickle=False) as digits:
        return torch.from_numpy(digits["images"]).unsqueeze(1), torch.from_numpy(digits["labels"]).long()


@dataclass(frozen=True)
class Source:
    """Where images come from, and what is done to those that are trained on.

    Attributes:
        folder: the data folder; None for ``$FTFAST_DATA`` or ``~/.cache/ftfast``.
        download: whether the network may be asked for what is not there.
        augmentation: of the training images.
        noise_images: so many of noise to train on, and as many to test on, in place of the data; 0 for the data.
    """

    folder: Path | None = None
    download: bool = False
    augmentation: Augmentation = field(default_factory=Augmentation)
    noise_images: int = 0


@dataclass(frozen=True)
class Dataset:
    """What a run needs to know of a data set, and how to get it.

    Attributes:
        title: for reports.
        image_shape: channels, height, width.
        train_images, test_images: how many.
        load: of a source, the images to train and to test on; None where they are read as they are needed.
        places: in the data folder, what is read there and what it is downloaded as; none of one that needs no files.
    """

    title: str
    classes: int
    image_shape: tuple[int, int, int]
    train_images: int
    test_images: int
    load: Callable[[Source], tuple[Split, Split]] | None
    places: tuple[str, ...] = ()

    @property
    def in_files(self) -> bool:
        """Whether it lies in the data folder."""
        return self.is_streamed or bool(self.places)

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
            places=(),
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


def _load_torchvision(
    name: str, kind: str, mean: tuple[float, ...], deviation: tuple[float, ...], source: Source
) -> tuple[Split, Split]:
    """The images of torchvision's class of that name, normalised by these numbers, a channel each."""
    from torchvision import datasets

    check_files(name, source)
    folder = source.folder or default_folder()
    places = [folder / place for place in DATASETS[name].places]
    if name == "fashion-mnist" and not places[0].exists() and DEBIAN_FASHION_MNIST.is_dir():
        parts = _read_debian()
    else:
        parts = [(part.data, part.targets) for part in _read(getattr(datasets, kind), name, folder, source.download)]
    normalisation = Normalisation.of(255, mean, deviation)
    train, test = (Split(_in_channels(pixels), torch.as_tensor(labels), normalisation) for pixels, labels in parts)
    return train, test


def _in_channels(pixels: Any) -> Tensor:
    """``[N, H, W]`` or ``[N, H, W, C]`` to ``[N, C, H, W]``."""
    found = torch.as_tensor(pixels)
    return found.unsqueeze(1) if found.dim() == 3 else found.permute(0, 3, 1, 2).contiguous()


def _read(make: Callable[..., Any], name: str, folder: Path, download: bool) -> list[Any]:
    """torchvision's train and test parts."""
    try:
        if download:
            folder.mkdir(parents=True, exist_ok=True)
        parts = [make(folder, train=is_train, download=download) for is_train in (True, False)]
        if any(len(part.data) != len(part.targets) for part in parts):
            raise ValueError
        return parts
    except (URLError, TimeoutError, ConnectionError) as error:
        raise _not_downloaded(name, folder, getattr(error, "reason", error)) from None
    except OSError as error:
        raise DataError(f"{name} cannot be read in {folder} ({error.strerror or error}); see --data-dir.") from None
    except Exception as error:  # cut files make the readers fail in many ways
        if download and "rror downloading" in str(error):
            raise _not_downloaded(name, folder, "no mirror answered") from None
        found = " and ".join(str(folder / place) for place in DATASETS[name].places if (folder / place).exists())
        raise DataError(
            f"{name} is incomplete or damaged; remove {found or folder} and run again with --download."
        ) from None


def _not_downloaded(name: str, folder: Path, reason: object) -> DataError:
    return DataError(
        f"{name} cannot be downloaded ({reason}); try again later, or bring {DATASETS[name].places[0]} "
        f"into {folder} from another machine."
    )


def _read_debian() -> list[tuple[Tensor, Tensor]]:
    """The package's files as they are, which torchvision reads unpacked alone."""
    parts = []
    try:
        for part in ("train", "t10k"):
            pixels, labels = (
                torch.frombuffer(
                    bytearray(gzip.decompress((DEBIAN_FASHION_MNIST / f"{part}-{file}-ubyte.gz").read_bytes())),
                    dtype=torch.uint8,
                    offset=header,
                )
                for file, header in (("images-idx3", 16), ("labels-idx1", 8))
            )
            parts.append((pixels.view(len(labels), 28, 28), labels.long()))
    except (OSError, EOFError, zlib.error, ValueError, RuntimeError):
        raise DataError(
            f"{DEBIAN_FASHION_MNIST} is damaged; install the package dataset-fashion-mnist again."
        ) from None
    return parts


# Mean and deviation of the training images; those of CIFAR-10 are the authors' code's, which its teachers were given.
DATASETS = {
    "digits": Dataset("handwritten digits of scikit-learn, 8x8 pixels", 10, (1, 8, 8), 1000, 797, _load_digits),
    # Xiao, Rasul and Vollgraf 2017
    "fashion-mnist": Dataset(
        "Fashion-MNIST, 28x28 pixels",
        10,
        (1, 28, 28),
        60_000,
        10_000,
        partial(_load_torchvision, "fashion-mnist", "FashionMNIST", (0.2860,), (0.3530,)),
        ("FashionMNIST/raw",),
    ),
    # Krizhevsky 2009, in the files of their python version
    "cifar10": Dataset(
        "CIFAR-10, 32x32 pixels",
        10,
        (3, 32, 32),
        50_000,
        10_000,
        partial(_load_torchvision, "cifar10", "CIFAR10", (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
        ("cifar-10-batches-py", "cifar-10-python.tar.gz"),
    ),
    "cifar100": Dataset(
        "CIFAR-100, 32x32 pixels",
        100,
        (3, 32, 32),
        50_000,
        10_000,
        partial(_load_torchvision, "cifar100", "CIFAR100", (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
        ("cifar-100-python", "cifar-100-python.tar.gz"),
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
