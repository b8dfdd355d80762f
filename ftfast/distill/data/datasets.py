"""Public data sets as uint8 tensors, read by torchvision's own classes out of one folder, the data folder.

Nothing is fetched over the network unless ``download`` asks for it.
"""

import gzip
import os
import shutil
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.error import URLError

import numpy as np
import torch
from torch import Tensor

from ftfast.errors import DistillError
from ftfast.user_folder import user_folder

Labelled = tuple[Tensor, Tensor]
"""Images ``[N, C, H, W]`` uint8 and labels ``[N]`` int64."""

DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
# Where torchvision's classes look in the data folder: what they read, and what they download it as.
PLACES = {
    "fashion-mnist": ("FashionMNIST/raw",),
    "cifar10": ("cifar-10-batches-py", "cifar-10-python.tar.gz"),
    "cifar100": ("cifar-100-python", "cifar-100-python.tar.gz"),
}


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
    if download or any((folder / place).exists() for place in PLACES[name]):
        return
    if name == "fashion-mnist" and DEBIAN_FASHION_MNIST.is_dir():
        return
    raise DataError(
        f"{name} is not in {folder}; give --download to fetch it, or --data-dir with the folder that holds "
        f"{PLACES[name][0]}."
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

    raw = folder / PLACES["fashion-mnist"][0]
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
        found = " and ".join(str(folder / place) for place in PLACES[name] if (folder / place).exists())
        raise DataError(
            f"{name} is incomplete or damaged; remove {found or folder} and run again with --download."
        ) from None


def _not_downloaded(name: str, folder: Path, reason: object) -> DataError:
    return DataError(
        f"{name} cannot be downloaded ({reason}); try again later, or bring {PLACES[name][0]} "
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
