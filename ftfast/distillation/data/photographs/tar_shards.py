"""Tar shards as WebDataset writes them, read by an index of where each photograph lies.

WebDataset's own reader streams, and so can neither shuffle all images nor go on in mid-epoch exactly; with the index
the images are drawn as from a folder. Members that are no image, class or label are left alone: nothing is unpickled.
"""

import json
import os
import resource
import tarfile
from functools import lru_cache
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np

from ftfast.distillation.data.photographs import shard_index
from ftfast.distillation.data.photographs.image_files import KINDS
from ftfast.errors import DataError, shown

CLASS, DESCRIPTION = "cls", "json"
MOST_OPEN = 256


class ShardFiles:
    """Photographs in tar files, by file, offset and size ``[N, 3]``.

    A bounded number of the files is open, those read last. Nothing depends on where a file was last read, so threads
    and forked processes may share what is open.
    """

    def __init__(self, paths: list[Path], places: np.ndarray) -> None:
        self._paths = paths
        self._places = places
        self._open = lru_cache(_most_open())(FileIO)  # closed when the last one that reads it lets go

    def __reduce__(self) -> tuple[Any, ...]:
        return ShardFiles, (self._paths, self._places)

    def read(self, index: int) -> bytes:
        """Raises OSError where the file cannot be opened or read, and DataError where it has become shorter."""
        shard, offset, size = (int(value) for value in self._places[index])
        try:
            file = self._open(self._paths[shard])
            content = os.pread(file.fileno(), size, offset)
            while len(content) < size:
                more = os.pread(file.fileno(), size - len(content), offset + len(content))
                if not more:
                    raise DataError(
                        f"{shown(self.name(index))} ends too early: the shard was changed since the run began."
                    )
                content += more
            return content
        except OSError:
            self._open.cache_clear()  # a further try opens anew, and with nothing else open
            raise

    def name(self, index: int) -> str:
        shard, offset, _ = self._places[index]
        return f"{self._paths[shard]} at byte {offset}"


def _most_open() -> int:
    """A quarter of what the process may have open at most, the rest being torch's."""
    allowed, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return MOST_OPEN if allowed == resource.RLIM_INFINITY else max(1, min(MOST_OPEN, allowed // 4))


def list_shards(folder: Path, split: str) -> tuple[ShardFiles, np.ndarray]:
    """The photographs of all ``SPLIT-*.tar`` and their labels ``[N]`` int64, in the shards' order.

    Raises:
        DataError: no shards, one that is cut short or no tar file, or a photograph without a label.
    """
    paths = sorted(folder.glob(f"{split}-*.tar"))
    if not paths:
        raise DataError(
            f"{shown(str(folder))} has no {split}-*.tar; --loader webdataset takes such shards of photographs and "
            "labels."
        )
    rows = shard_index.rows_of(folder, split, paths, _list_shard)
    number = np.repeat(np.arange(len(paths)), [len(own) for own in rows])
    found = np.concatenate(rows)
    if not len(found):
        raise DataError(f"{shown(str(folder))} has no photographs ({', '.join(KINDS)}) in its {split}-*.tar.")
    return ShardFiles(paths, np.column_stack([number, found[:, :2]])), found[:, 2].copy()


def _list_shard(path: Path) -> np.ndarray:
    """Offset, size and label of each photograph, ``[N, 3]``; the members of one share their name up to its first dot.

    A ``.cls`` is the label; a ``.json`` beside it may be of anything else.
    """
    images: dict[str, tuple[int, int]] = {}
    classes: dict[str, int] = {}
    described: dict[str, Any] = {}
    try:
        with tarfile.open(path, "r:") as shard:
            for member in shard:
                folder, _, name = member.name.rpartition("/")
                stem, _, kind = name.partition(".")
                key, kind = f"{folder}/{stem}", kind.lower()
                if not member.isreg():
                    continue
                if kind in KINDS:
                    if key in images:
                        raise DataError(f"{shown(str(path))} has two photographs of {_shown(key)}; leave one.")
                    images[key] = (member.offset_data, member.size)
                elif kind in (CLASS, DESCRIPTION):
                    file = shard.extractfile(member)
                    assert file is not None
                    if kind == DESCRIPTION:
                        described[key] = _described_label(file.read())
                    else:
                        classes[key] = _checked(path, key, _class_of(file.read()))
    except (tarfile.TarError, EOFError) as error:
        raise DataError(f"{shown(str(path))} is cut short or no tar file ({shown(str(error))}).") from None
    except OSError as error:
        raise DataError(f"{shown(str(path))} cannot be read ({error.strerror or error}).") from None
    if images and max(offset + size for offset, size in images.values()) > path.stat().st_size:
        raise DataError(f"{shown(str(path))} is cut short: its last photograph ends behind the file's end.")
    labels = {key: _label(path, key, classes.get(key), described.get(key)) for key in images}
    return np.array([(*place, labels[key]) for key, place in images.items()], dtype=np.int64).reshape(-1, 3)


def _label(path: Path, key: str, given: int | None, described: Any) -> int:
    """The class that is given, or else that of the description; raises DataError where there is none, or two."""
    if given is None and described is None:
        raise DataError(
            f"{shown(str(path))} has {_shown(key)} without a label; it takes a .cls with a whole number beside each, "
            'or a .json {"label": 3}.'
        )
    if given is None:
        return _checked(path, key, described)
    if type(described) is int and described != given:
        raise DataError(
            f"{shown(str(path))} has two labels of {_shown(key)}, {given} in its .cls and {described} in its .json; "
            "leave one."
        )
    return given


def _class_of(content: bytes) -> int | None:
    try:
        return int(content.decode().strip())
    except ValueError:
        return None


def _described_label(content: bytes) -> Any:
    """None where there is none."""
    try:
        described = json.loads(content)
    except (ValueError, RecursionError):
        return None
    return described.get("label") if isinstance(described, dict) else None


def _checked(path: Path, key: str, label: Any) -> int:
    if type(label) is not int or not 0 <= label < 1 << 31:
        raise DataError(
            f"{shown(str(path))} holds a label of {_shown(key)} that is no whole number: .cls takes one, .json "
            '{"label": 3}.'
        )
    return label


def _shown(key: str) -> str:
    return shown(key.lstrip("/"))
