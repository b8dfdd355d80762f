"""Tar shards as WebDataset writes them, read by an index of where each photograph lies.

WebDataset's own reader streams, and so can neither shuffle all images nor go on in mid-epoch exactly; with the index
the images are drawn as from a folder. Members that are no image, class or label are left alone: nothing is unpickled.
"""

import json
import os
import tarfile
from pathlib import Path

import numpy as np

from ftfast.distill.datasets import DataError

IMAGES = ("jpg", "jpeg", "png")
LABELS = ("cls", "json")


class ShardFiles:
    """Photographs in tar files, by file, offset and size ``[N, 3]``; each process opens the files for itself."""

    def __init__(self, paths: list[Path], places: np.ndarray) -> None:
        self._paths = paths
        self._places = places
        self._handles: dict[tuple[int, int], int] = {}

    def read(self, index: int) -> bytes:
        shard, offset, size = (int(value) for value in self._places[index])
        of_process = (os.getpid(), shard)
        if of_process not in self._handles:
            self._handles[of_process] = os.open(self._paths[shard], os.O_RDONLY)
        return os.pread(self._handles[of_process], size, offset)

    def name(self, index: int) -> str:
        shard, offset, _ = self._places[index]
        return f"{self._paths[shard]} at byte {offset}"


def list_shards(folder: Path, part: str) -> tuple[ShardFiles, np.ndarray]:
    """The photographs of all ``part-*.tar`` and their labels ``[N]`` int64, in the shards' order.

    Raises:
        DataError: no shards, one that is cut short or no tar file, or a photograph without a label.
    """
    paths = sorted(folder.glob(f"{part}-*.tar"))
    if not paths:
        raise DataError(
            f"{folder} has no {part}-*.tar; --loader webdataset takes such shards of photographs and labels."
        )
    places: list[tuple[int, int, int]] = []
    labels: list[int] = []
    for number, path in enumerate(paths):
        for offset, size, label in _list_shard(path):
            places.append((number, offset, size))
            labels.append(label)
    if not places:
        raise DataError(f"{folder} has no photographs ({', '.join(IMAGES)}) in its {part}-*.tar.")
    return ShardFiles(paths, np.array(places, dtype=np.int64)), np.array(labels, dtype=np.int64)


def _list_shard(path: Path) -> list[tuple[int, int, int]]:
    """Offset, size and label of each photograph; the members of one share their name up to its first dot."""
    images: dict[str, tuple[int, int]] = {}
    labels: dict[str, int] = {}
    try:
        with tarfile.open(path, "r:") as shard:
            for member in shard:
                key, _, kind = member.name.rpartition("/")[2].partition(".")
                key = f"{member.name.rpartition('/')[0]}/{key}"
                if not member.isreg():
                    continue
                if kind.lower() in IMAGES:
                    images[key] = (member.offset_data, member.size)
                elif kind.lower() in LABELS:
                    content = shard.extractfile(member)
                    assert content is not None
                    labels[key] = _label(content.read(), kind.lower())
    except (tarfile.TarError, OSError, EOFError) as error:
        raise DataError(f"{path} is cut short or no tar file ({error}).") from None
    except (ValueError, KeyError, TypeError):
        raise DataError(
            f'{path} holds a label that is no whole number: .cls takes one, .json {{"label": 3}}.'
        ) from None
    if images and max(offset + size for offset, size in images.values()) > path.stat().st_size:
        raise DataError(f"{path} is cut short: its last photograph ends behind the file's end.")
    if unlabelled := sorted(set(images) - set(labels)):
        raise DataError(
            f"{path} has {unlabelled[0].lstrip('/')} without a label; it takes a .cls or .json beside each."
        )
    return [(*place, labels[key]) for key, place in images.items()]


def _label(content: bytes, kind: str) -> int:
    label = int(content.decode().strip()) if kind == "cls" else json.loads(content)["label"]
    if isinstance(label, bool) or not isinstance(label, int) or label < 0:
        raise ValueError
    return label
