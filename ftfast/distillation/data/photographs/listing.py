"""Which photographs there are: files in one folder a class, or tar shards; their labels, and how to read one."""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from ftfast.distillation.data.class_names import KEY, difference
from ftfast.distillation.data.photographs import tar_shards
from ftfast.distillation.data.photographs.image_files import KINDS
from ftfast.distillation.data.source import default_folder
from ftfast.errors import DataError, shown

TRAIN, TEST = "train", "val"


class Files(Protocol):
    """The bytes of photographs by number, from any process."""

    def read(self, index: int) -> bytes: ...

    def name(self, index: int) -> str: ...


class Photographs(NamedTuple):
    """Photographs and their labels ``[N]`` int64, in an order that is the same at every call.

    Attributes:
        class_names: by label; None of shards, whose labels are numbers without a name.
    """

    files: Files
    labels: np.ndarray
    classes: int
    class_names: tuple[str, ...] | None = None


class Counts(NamedTuple):
    """How many there are."""

    classes: int
    train_images: int
    test_images: int


IMAGENET = Counts(1000, 1_281_167, 50_000)  # ILSVRC 2012


class FolderFiles:
    """Files below one folder; their paths are one array of the file system's bytes, which forked processes share."""

    def __init__(self, folder: Path, paths: list[str]) -> None:
        self._folder = folder
        self._paths = np.array([os.fsencode(path) for path in paths])

    def read(self, index: int) -> bytes:
        return Path(self.name(index)).read_bytes()

    def name(self, index: int) -> str:
        return str(self._folder / os.fsdecode(self._paths[index]))


@lru_cache(maxsize=8)
def list_photographs(folder: Path, loader: str, split: str) -> Photographs:
    """The photographs of ``"train"`` or ``"val"`` as a loader of :data:`LOADERS` that reads files finds them.

    Raises:
        DataError: none there, or shards that cannot be read.
    """
    list_files = LOADERS[loader].list_files
    assert list_files is not None
    return list_files(folder, split)


def _list_shards(folder: Path, split: str) -> Photographs:
    found, labels = tar_shards.list_shards(folder, split)
    return Photographs(found, labels, int(labels.max()) + 1)


def _list_either(folder: Path, split: str) -> Photographs:
    """Shards where there are such and no folders to train on, so that both splits are of one kind."""
    has_shards = not (folder / TRAIN).is_dir() and next(folder.glob(f"{TRAIN}-*.tar"), None) is not None
    return (_list_shards if has_shards else _list_folders)(folder, split)


def _list_folders(home: Path, split: str) -> Photographs:
    folder = home / split
    if not folder.is_dir():
        raise DataError(
            f"{shown(str(folder))} is not there; photographs are taken from --data-dir with {TRAIN}/CLASS/*.jpeg and "
            f"{TEST}/CLASS/*.jpeg, or with --loader webdataset from {TRAIN}-*.tar and {TEST}-*.tar."
        )
    names = sorted(entry.name for entry in os.scandir(folder) if _is_shown_folder(entry))
    if not names:
        raise DataError(f"{shown(str(folder))} holds no photographs in one folder a class: it has no folders.")
    endings = tuple(f".{kind}" for kind in KINDS)
    resolved = folder.resolve()
    above = frozenset(map(_identity, (resolved, *resolved.parents)))
    paths: list[str] = []
    labels: list[int] = []
    for label, name in enumerate(names):
        found = sorted(_folders_below(str(folder / name), above))
        paths += [os.path.join(at, file) for at, files in found for file in files if file.lower().endswith(endings)]
        if len(paths) == len(labels):
            raise DataError(
                f"{shown(str(folder / name))} holds no photographs; every folder there is a "
                f"class and takes {', '.join(endings)}: bring some, or remove it."
            )
        labels += [label] * (len(paths) - len(labels))
    beginning = len(os.path.join(folder, ""))
    return Photographs(
        FolderFiles(folder, [path[beginning:] for path in paths]),
        np.array(labels, dtype=np.int64),
        len(names),
        tuple(names),
    )


def _is_shown_folder(entry: os.DirEntry[str]) -> bool:
    """Hidden ones are no class and no part of one: notebooks and file managers leave such."""
    return not entry.name.startswith(".") and entry.is_dir()


def _may_be_read(entry: os.DirEntry[str]) -> bool:
    """A file, or a link to none, which is missed where it is read; not a pipe, which would be waited for."""
    return entry.is_file() or (entry.is_symlink() and not os.path.exists(entry.path))


def _identity(folder: str | Path) -> tuple[int, int]:
    status = os.stat(folder)
    return status.st_dev, status.st_ino


def _folders_below(folder: str, above: frozenset[tuple[int, int]]) -> Iterator[tuple[str, list[str]]]:
    """Each folder with its files in order; links are followed, but not to a folder that they lie in."""
    here = _identity(folder)
    if here in above:
        return
    entries = list(os.scandir(folder))
    yield folder, sorted(entry.name for entry in entries if _may_be_read(entry))
    for entry in entries:
        if _is_shown_folder(entry):
            yield from _folders_below(entry.path, above | {here})


def list_both(folder: Path, loader: str) -> tuple[Photographs, Photographs]:
    """Those to train on and those to test on, whose labels mean the same classes.

    Raises:
        DataError: none there, or training and test photographs of unlike classes.
    """
    train, test = (list_photographs(folder, loader, split) for split in (TRAIN, TEST))
    unlike = difference((TRAIN, train.class_names), (TEST, test.class_names))
    if train.classes != test.classes or unlike:
        raise DataError(
            f"{shown(str(folder))} has {train.classes} classes in {TRAIN} and {test.classes} in {TEST}{unlike}; it "
            "takes the same in both."
        )
    return train, test


def describe(folder: Path, loader: str) -> Counts:
    """Counts the photographs of a folder.

    Raises:
        DataError: none there, or training and test photographs of unlike classes.
    """
    train, test = list_both(folder, loader)
    return Counts(train.classes, len(train.labels), len(test.labels))


def named(folder: str | Path | None, loader: str) -> dict[str, list[str]]:
    """What a checkpoint's description says of photographs that it was trained on.

    Args:
        folder: of the data; None for the default one.

    Raises:
        DataError: no photographs there.
    """
    if LOADERS[loader].is_noise:
        return {}
    names = list_photographs(Path(folder or default_folder()), loader, TRAIN).class_names
    return {} if names is None else {KEY: list(names)}


@dataclass(frozen=True)
class Loader:
    """A way in which photographs come; an entry of :data:`LOADERS` is all that a run needs to know of it.

    Attributes:
        title: what ``--help`` says of it.
        list_files: of the data folder and ``"train"`` or ``"val"``, the photographs; None where there are no files.
        on_device: decoded and cut by a GPU.
        has_rand_augment: whether it can augment further.
    """

    title: str
    list_files: Callable[[Path, str], Photographs] | None
    on_device: bool = False
    has_rand_augment: bool = True

    @property
    def is_noise(self) -> bool:
        """Whether its photographs show nothing."""
        return self.list_files is None


LOADERS = {
    "folder": Loader("files in one folder a class", _list_folders),
    "gpu": Loader("either of these decoded by the GPU", _list_either, on_device=True, has_rand_augment=False),
    "webdataset": Loader("tar shards", _list_shards),
    "synthetic": Loader("noise, without files", None, has_rand_augment=False),
}
