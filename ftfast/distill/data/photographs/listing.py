"""Which photographs there are: JPEG files in one folder a class, or tar shards; their labels, and how to read one."""

from functools import lru_cache
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from ftfast.distill.data.datasets import DataError
from ftfast.distill.data.photographs import tar_shards

TRAIN, TEST = "train", "val"


class Files(Protocol):
    """The bytes of photographs by number, from any process."""

    def read(self, index: int) -> bytes: ...

    def name(self, index: int) -> str: ...


class Photographs(NamedTuple):
    """Photographs and their labels ``[N]`` int64, in an order that is the same at every call."""

    files: Files
    labels: np.ndarray
    classes: int


class Counts(NamedTuple):
    """How many there are."""

    classes: int
    train_images: int
    test_images: int


IMAGENET = Counts(1000, 1_281_167, 50_000)  # ILSVRC 2012


class FolderFiles:
    """Files below one folder; their paths are one array, which forked processes share."""

    def __init__(self, folder: Path, paths: list[str]) -> None:
        self._folder = folder
        self._paths = np.array([path.encode() for path in paths])

    def read(self, index: int) -> bytes:
        return Path(self.name(index)).read_bytes()

    def name(self, index: int) -> str:
        return str(self._folder / self._paths[index].decode())


@lru_cache(maxsize=8)
def list_photographs(folder: Path, loader: str, part: str) -> Photographs:
    """The photographs of ``"train"`` or ``"val"``: ``part/CLASS/*.jpeg``, or shards ``part-*.tar`` (``"webdataset"``).

    The loader ``"gpu"`` takes both, files in folders where there are such.

    Raises:
        DataError: none there, or shards that cannot be read.
    """
    has_shards = not (folder / part).is_dir() and next(folder.glob(f"{part}-*.tar"), None) is not None
    if loader == "webdataset" or (loader == "gpu" and has_shards):
        found, labels = tar_shards.list_shards(folder, part)
        return Photographs(found, labels, int(labels.max()) + 1)
    return _list_folder(folder / part)


def _list_folder(folder: Path) -> Photographs:
    from torchvision.datasets import ImageFolder

    if not folder.is_dir():
        raise DataError(
            f"{folder} is not there; photographs are taken from --data-dir with {TRAIN}/CLASS/*.jpeg and "
            f"{TEST}/CLASS/*.jpeg, or with --loader webdataset from {TRAIN}-*.tar and {TEST}-*.tar."
        )
    try:
        listed = ImageFolder(str(folder))
    except FileNotFoundError as error:
        raise DataError(
            f"{folder} holds no photographs in one folder a class ({str(error).splitlines()[0]})."
        ) from None
    paths = [str(Path(path).relative_to(folder)) for path, _ in listed.samples]
    return Photographs(FolderFiles(folder, paths), np.array(listed.targets, dtype=np.int64), len(listed.classes))


def describe(folder: Path, loader: str) -> Counts:
    """Counts the photographs of a folder.

    Raises:
        DataError: none there, or training and test photographs of unlike classes.
    """
    train, test = (list_photographs(folder, loader, part) for part in (TRAIN, TEST))
    if train.classes != test.classes:
        raise DataError(
            f"{folder} has {train.classes} classes in {TRAIN} and {test.classes} in {TEST}; it takes the same in both."
        )
    return Counts(train.classes, len(train.labels), len(test.labels))


WITHOUT_RAND_AUGMENT = ("gpu", "synthetic")
