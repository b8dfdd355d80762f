"""An open store: its rows by number and view, read straight into the batch's own memory."""

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ftfast.distillation.runtime import checkpoint, files
from ftfast.distillation.runtime.checkpoint import Checkpoint
from ftfast.distillation.store import header as headers
from ftfast.distillation.store.shard_files import (
    DTYPES,
    FACTORS,
    LOGITS,
    LOGITS_DTYPE,
    VIEWS,
    Head,
    as_factors,
    check_head,
    read_head,
    read_whole,
    shard_path,
)
from ftfast.errors import CheckpointError, StoreError
from ftfast.ops.read_rows import RowError, read_rows

TEACHER, PARAPHRASER = "teacher", "paraphraser"


class Rows(NamedTuple):
    """Images by number and the view of each, both ``[N]`` int64."""

    images: np.ndarray
    views: np.ndarray


class Store:
    """A finished store, opened to be read; sizes and heads of all shards have been checked, tensors have not.

    Attributes:
        path, header: see there.
        boxes: of all views, ``[images, views, 5]`` int32.

    Raises:
        StoreError: unfinished, of a newer version, or a file that is missing, cut short or another's.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.header = path, headers.read(path)
        if not self.header.is_finished:
            raise StoreError(f"the store {path} is not finished; go on with ftfast store build RUN {path} --resume.")
        self.heads: list[Head] = []
        for shard in range(self.header.shard_count):
            self.heads.append(read_head(shard_path(path, shard)))
            check_head(shard_path(path, shard), self.heads[-1], self.header, shard)
        self.boxes = self.read_all(VIEWS, "<i4")
        self._files: dict[int, int] = {}

    def read_all(self, name: str, dtype: str) -> np.ndarray:
        """One of the tensors of a shard, of all shards one after the other.

        Raises:
            StoreError: a file that cannot be read or was cut short since it was opened.
        """
        paths = (shard_path(self.path, shard) for shard in range(len(self.heads)))
        return np.concatenate(
            [read_whole(path, head, name, np.dtype(dtype)) for path, head in zip(paths, self.heads, strict=True)]
        )

    def checkpoint_of(self, name: str) -> Checkpoint:
        """The store's copy of its ``"teacher"`` or ``"paraphraser"``.

        Raises:
            StoreError: it is not there, damaged, or another one.
        """
        try:
            found = checkpoint.load(self.path / name)
        except CheckpointError as error:
            raise StoreError(f"the store's {name} cannot be used: {error}") from None
        headers.check_hashes(self.path, self.header, {name: files.hash_tensors(found.tensors)})
        return found

    def read(self, rows: Rows, *, pinned: bool = False) -> tuple[Tensor, ...]:
        """Factors ``[N, C, H, W]``, channels_last, in the store's dtype, and logits ``[N, classes]`` where it has them.

        Args:
            pinned: in memory that a GPU copies from by itself.

        Raises:
            StoreError: a file that cannot be read or was cut short since it was opened.
        """
        channels, height, width = self.header.factor
        found = [as_factors(self._gather(FACTORS, rows, DTYPES[self.header.dtype], (height, width, channels), pinned))]
        if self.header.classes:
            found.append(self._gather(LOGITS, rows, LOGITS_DTYPE, (self.header.classes,), pinned))
        return tuple(found)

    def _gather(self, name: str, rows: Rows, dtype: torch.dtype, shape: tuple[int, ...], pinned: bool) -> Tensor:
        made = torch.empty((len(rows.images), *shape), dtype=dtype, pin_memory=pinned)
        if not made.numel():
            return made
        row_bytes = made.nbytes // len(made)
        shards, within = np.divmod(rows.images, self.header.shard_images)
        firsts = np.array([self.heads[shard].places[name].first for shard in shards.tolist()])
        offsets = firsts + (within * self.header.views + rows.views) * row_bytes
        files = np.array([self._file(shard) for shard in shards.tolist()])
        try:
            read_rows(files, offsets, made)
        except RowError as error:
            path = shard_path(self.path, int(shards[error.row]))
            if error.errno == errno.ENODATA:
                raise StoreError(f"{path} was cut short while it was read.") from None
            raise StoreError(f"{path} cannot be read ({error.strerror}).") from None
        return made

    def _file(self, shard: int) -> int:
        if shard not in self._files:
            path = shard_path(self.path, shard)
            try:
                self._files[shard] = os.open(path, os.O_RDONLY)
            except OSError as error:
                raise StoreError(f"{path} cannot be read ({error.strerror}).") from None
            os.posix_fadvise(self._files[shard], 0, 0, os.POSIX_FADV_RANDOM)
        return self._files[shard]

    def __getstate__(self) -> dict[str, Any]:
        """In another process the files are opened anew."""
        return {**self.__dict__, "_files": {}}

    def close(self) -> None:
        """Closes the files; they are opened anew where rows are read again."""
        while self._files:
            os.close(self._files.popitem()[1])


def check_whole(store: Store, advance: Callable[[int], None] = lambda _: None) -> None:
    """Reads every byte; raises StoreError naming the first shard and tensor that is not as it was written."""
    from ftfast.distillation.store.shard_files import check_content

    for shard, head in enumerate(store.heads):
        check_content(shard_path(store.path, shard), head)
        advance(len(store.header.rows_of(shard)))
