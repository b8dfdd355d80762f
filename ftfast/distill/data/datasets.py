"""The data sets, each an entry of :data:`DATASETS`; public ones are read by torchvision out of the data folder.

Nothing is fetched over the network unless ``download`` asks for it.
"""

import gzip
import os
import shutil
import tempfile
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

from ftfast.distill.data.augment import Augmentation
from ftfast.distill.data.in_memory import Normalisation, Split
from ftfast.errors import DistillError
from ftfast.user_folder import user_folder

Labelled = tuple[Tensor, Tensor]
"""Images ``[N, C, H, W]`` uint8 and labels ``[N]`` int64."""

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


def check_is_there(name: str, folder: Path, download: bool) -> None:
    """Raises DataError where nothing of a data set is in the folder, or can be brought there."""
    if download or any((folder / place).exists() for place in DATASETS[name].places):
        return
    if name == "fashion-mnist" and DEBIAN_FASHION_MNIST.is_dir():
        return
    raise DataError(
        f"{name} is not in {folder}; give --download to fetch it, or --data-dir with the folder that holds "
        f"{DATASETS[name].places[0]}."
    )


def read_digits() -> Labelled:
    """1797 handwritten digits of 8x8 pixels from 0 to 16, as scikit-learn's load_digits gives them.

    They come with the package; digits.txt beside them says where from.
    """
    with np.load(Path(__file__).with_name("digits.npz"), allow_pickle=False) as digits:
        return torch.from_numpy(digits["images"]).unsqueeze(1), torch.from_numpy(digits["labels"]).long()


def read_fashion_mnist(folder: Path, download: bool) -> tuple[Labelled, Labelled]:
    """70,000 pictures of clothes, 28x28 (Xiao, Rasul and Vollgraf 2017); unpacked from Debian's package where that is.

    Raises:
        DataError: not there and not to be downloaded, no network, or damaged files.
    """
    from torchvision.datasets import FashionMNIST

    raw = folder / DATASETS["fashion-mnist"].places[0]
    if not raw.exists() and DEBIAN_FASHION_MNIST.is_dir():
        _unpack(DEBIAN_FASHION_MNIST, raw)
    parts = _read(FashionMNIST, "fashion-mnist", folder, download)
    train, test = ((part.data.unsqueeze(1), part.targets.long()) for part in parts)
    return train, test


def read_cifar10(folder: Path, download: bool) -> tuple[Labelled, Labelled]:
    """60,000 photographs of 10 classes, 32x32 (Krizhevsky 2009), in the files of its python version.

    Raises:
        DataError: not there and not to be downloaded, no network, or damaged files.
    """
    from torchvision.datasets import CIFAR10

    return _read_cifar(CIFAR10, "cifar10", folder, download)


def read_cifar100(folder: Path, download: bool) -> tuple[Labelled, Labelled]:
    """60,000 photographs of 100 classes, 32x32 (Krizhevsky 2009), in the files of its python version.

    Raises:
        DataError: not there and not to be downloaded, no network, or damaged files.
    """
    from torchvision.datasets import CIFAR100

    return _read_cifar(CIFAR100, "cifar100", folder, download)


def _read_cifar(kind: Any, name: str, folder: Path, download: bool) -> tuple[Labelled, Labelled]:
    parts = _read(kind, name, folder, download)
    train, test = (
        (torch.from_numpy(np.ascontiguousarray(part.data.transpose(0, 3, 1, 2))), torch.tensor(part.targets))
        for part in parts
    )
    return train, test


def _read(make: Callable[..., Any], name: str, folder: Path, download: bool) -> list[Any]:
    """torchvision's train and test parts."""
    check_is_there(name, folder, download)
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


def _unpack(source: Path, target: Path) -> None:
    """Every ``.gz`` file of a folder into another, which is there whole or not at all."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=".unpacking.", dir=target.parent))
    except OSError as error:
        raise DataError(f"{target} cannot be written ({error.strerror}); choose another --data-dir.") from None
    try:
        for packed in source.glob("*.gz"):
            with gzip.open(packed) as content, open(aside / packed.stem, "wb") as file:
                shutil.copyfileobj(content, file)
        aside.chmod(0o755)
        if not target.exists():  # another process may have been faster
            aside.rename(target)
    except (EOFError, zlib.error, gzip.BadGzipFile):
        raise DataError(f"{source} is damaged; install the package dataset-fashion-mnist again.") from None
    except OSError as error:
        if not target.exists():
            raise DataError(f"{target} cannot be written ({error.strerror}); choose another --data-dir.") from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)


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


def _load_digits(_source: Source) -> tuple[Split, Split]:
    """1000 digits to train on, 797 to test."""
    images, labels = read_digits()
    train, test = Split(images, labels).stratified(1000)
    training = train.pixels.float() / 16
    normalisation = Normalisation(16, *(value.reshape(1, 1, 1) for value in (training.mean(), training.std())))
    return replace(train, normalisation=normalisation), replace(test, normalisation=normalisation)


def _load_files(
    read: Callable[..., tuple[Labelled, Labelled]], normalisation: Normalisation, source: Source
) -> tuple[Split, Split]:
    train, test = read(source.folder or default_folder(), source.download)
    return Split(*train, normalisation=normalisation), Split(*test, normalisation=normalisation)


# Mean and deviation of the training images; those of CIFAR-10 are the authors' code's, which its teachers were given.
DATASETS = {
    "digits": Dataset("handwritten digits of scikit-learn, 8x8 pixels", 10, (1, 8, 8), 1000, 797, _load_digits),
    "fashion-mnist": Dataset(
        "Fashion-MNIST, 28x28 pixels",
        10,
        (1, 28, 28),
        60_000,
        10_000,
        partial(_load_files, read_fashion_mnist, Normalisation.of(255, (0.2860,), (0.3530,))),
        ("FashionMNIST/raw",),
    ),
    "cifar10": Dataset(
        "CIFAR-10, 32x32 pixels",
        10,
        (3, 32, 32),
        50_000,
        10_000,
        partial(
            _load_files,
            read_cifar10,
            Normalisation.of(255, (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
        ),
        ("cifar-10-batches-py", "cifar-10-python.tar.gz"),
    ),
    "cifar100": Dataset(
        "CIFAR-100, 32x32 pixels",
        100,
        (3, 32, 32),
        50_000,
        10_000,
        partial(
            _load_files,
            read_cifar100,
            Normalisation.of(255, (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
        ),
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


def check_files(name: str, source: Source) -> None:
    """Raises DataError where a data set's files are not there and are not to be downloaded; reads nothing."""
    if DATASETS[name].in_files and not DATASETS[name].is_streamed:
        check_is_there(name, source.folder or default_folder(), source.download)


def load(name: str, device: torch.device, source: Source | None = None) -> tuple[Split, Split]:
    """The train and test images of a data set, on the device; the former with the source's augmentation.

    Raises:
        DataError: its files are not there, damaged, or cannot be downloaded.
    """
    dataset, source = DATASETS[name], source or Source()
    assert dataset.load is not None
    train, test = dataset.load(source)
    if (len(train), len(test)) != (dataset.train_images, dataset.test_images):
        folder = source.folder or default_folder()
        raise DataError(
            f"{name} in {folder} has {len(train)} training and {len(test)} test images, not {dataset.train_images} "
            f"and {dataset.test_images}; remove its files there and run again with --download."
        )
    return replace(train, augmentation=source.augmentation).to(device), test.to(device)
