"""Where the photographs of tar shards lie, kept beside the shards: a walk through their headers takes long.

Every shard is known by its name, size and time of change, so one that was written anew is walked through anew. What
cannot be read is made again; an index is never needed.
"""

import os
from collections.abc import Callable
from contextlib import suppress
from hashlib import sha256
from io import BytesIO
from pathlib import Path
from typing import NamedTuple
from uuid import uuid4

import numpy as np

from ftfast.errors import DataError, shown
from ftfast.user_folder import user_folder

VERSION = 2  # the first knew fewer kinds of pictures


class Stamp(NamedTuple):
    """What tells one state of a shard from another: its name, size and last change in nanoseconds."""

    name: str
    bytes: int
    changed: int


Rows = np.ndarray
"""Offset, size and label of each photograph of one shard: ``[N, 3]`` int64."""


def rows_of(folder: Path, split: str, paths: list[Path], walk: Callable[[Path], Rows]) -> list[Rows]:
    """The rows of every shard, from the index where it knows them; an index that lacks some is written anew.

    Args:
        walk: makes the rows of one shard.

    Raises:
        DataError: a shard that is not there, or what ``walk`` raises.
    """
    known = {stamp: rows for place in _places(folder, split) for stamp, rows in _read(place).items()}
    found: dict[Stamp, Rows] = {}
    for path in paths:
        stamp = _stamp(path)  # before the walk, so that a change in between is seen the next time
        found[stamp] = known[stamp] if stamp in known else walk(path)
    if found.keys() - known.keys():
        _write(folder, split, found)
    return list(found.values())


def _stamp(path: Path) -> Stamp:
    try:
        state = path.stat()
    except OSError as error:
        raise DataError(f"{shown(str(path))} cannot be read ({error.strerror}).") from None
    return Stamp(path.name, state.st_size, state.st_mtime_ns)


def _places(folder: Path, split: str) -> list[Path]:
    """Beside the shards, and in the user's folder where these lie in one that cannot be written."""
    places = [folder / f".ftfast-{split}.npz"]
    if (kept := user_folder()) is not None:
        name = sha256(os.fsencode(folder.absolute())).hexdigest()[:32]
        places.append(kept / "shards" / f"{name}-{split}.npz")
    return places


def _read(path: Path) -> dict[Stamp, Rows]:
    """Nothing where there is none, or one that is damaged or of another version; nothing is unpickled."""
    try:
        with np.load(path, allow_pickle=False) as content:
            version, names, states, counts, rows = (
                content[name] for name in ("version", "names", "states", "counts", "rows")
            )
        if int(version) != VERSION or rows.dtype != np.int64 or rows.shape != (int(counts.sum()), 3):
            return {}
        found = {}
        for name, state, own in zip(names, states, np.split(rows, np.cumsum(counts)[:-1]), strict=True):
            stamp = Stamp(str(name), *(int(value) for value in state))
            if (own < 0).any() or (own[:, 0] + own[:, 1] > stamp.bytes).any():
                return {}
            found[stamp] = own
        return found
    except Exception:  # whatever a damaged file makes of numpy: the shards are walked through
        return {}


def _write(folder: Path, split: str, found: dict[Stamp, Rows]) -> None:
    content = BytesIO()
    np.savez(
        content,
        version=np.array(VERSION),
        names=np.array([stamp.name for stamp in found]),
        states=np.array([stamp[1:] for stamp in found], dtype=np.int64),
        counts=np.array([len(rows) for rows in found.values()], dtype=np.int64),
        rows=np.concatenate(list(found.values())),
    )
    for place in _places(folder, split):
        aside = place.with_name(f".ftfast-{uuid4().hex}.tmp")  # a name of its own: all processes of a run may be here
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            aside.write_bytes(content.getbuffer())
            os.replace(aside, place)
            return
        except OSError:
            with suppress(OSError):
                aside.unlink(missing_ok=True)
