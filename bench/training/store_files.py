"""Factor stores for the bench: of one batch's own factors many times over, and of several GB of noise."""

import dataclasses
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bench.training.step_peers import Operands
from ftfast.distillation.models import registry
from ftfast.distillation.models.frozen_teacher import FrozenTeacher
from ftfast.distillation.store import header as headers
from ftfast.distillation.store import shard_files
from ftfast.distillation.store.header import Header
from ftfast.distillation.store.read import Rows, Store
from ftfast.distillation.store.shard_files import DTYPES, quantise

DTYPE = "int8"
IMAGENET_FACTOR = (256, 7, 7)
_SHARD_BYTES = 64 << 20
_PASSED_BY = 8  # threads that ask the disk, for what it gives at most


def write_store(path: Path, factors: Tensor, images: int) -> Store:
    """A store of one view, whose image ``i`` has row ``i % len(factors)`` of factors ``[N, C, H, W]``."""
    rows = quantise(factors, DTYPES[DTYPE])
    row_bytes = rows[0].nbytes
    shard_images = max(1, _SHARD_BYTES // row_bytes // len(rows)) * len(rows)
    header = Header(
        settings=dict.fromkeys(headers.TAKEN),
        hashes={},
        transform={},
        images=images,
        views=1,
        factor=(factors.shape[1], factors.shape[2], factors.shape[3]),
        dtype=DTYPE,
        computed_in="bfloat16",
        classes=0,
        seed=0,
        batch_size=len(rows),
        shard_images=shard_images,
    )
    written = []
    for shard in range(header.shard_count):
        count = len(header.rows_of(shard))
        tensors = {
            shard_files.FACTORS: rows.repeat(-(-count // len(rows)), 1, 1, 1)[:count].unsqueeze(1).contiguous(),
            shard_files.VIEWS: torch.zeros(count, 1, 5, dtype=torch.int32),
            shard_files.LABELS: torch.zeros(count, dtype=torch.int64),
        }
        file = shard_files.shard_path(path, shard)
        shard_files.write_shard(file, tensors)
        head = shard_files.read_head(file)
        written.append({"bytes": head.bytes, "head": head.checksum})
    headers.write(path, dataclasses.replace(header, shards=written))
    return Store(path)


@torch.no_grad()
def factors_of(with_: Operands) -> Tensor:
    """What the operands' teacher and paraphraser give for their batch, in bfloat16."""
    images = with_.images.contiguous(memory_format=torch.channels_last)
    teacher = FrozenTeacher(with_.teacher(), with_.taught.layer, dtype=torch.bfloat16, example=images)
    paraphraser = registry.place(with_.paraphraser(), with_.device)
    with torch.autocast(with_.device.type, torch.bfloat16):
        return paraphraser.encode(teacher(images).features).cpu()


def same_batch(store: Store, batch: int, seed: int) -> Iterator[Rows]:
    """Without an end: the batch that a store repeats, each of its rows from a place drawn at random."""
    random = np.random.default_rng(seed)
    while True:
        repetition = random.integers(0, store.header.images // batch, batch)
        yield Rows(repetition * batch + np.arange(batch), np.zeros(batch, np.int64))


def shuffled(store: Store, batch: int, seed: int) -> Iterator[Rows]:
    """Without an end: every image once, then again in another order."""
    random = np.random.default_rng(seed)
    while True:
        order = random.permutation(store.header.images)
        for first in range(0, len(order) - batch + 1, batch):
            yield Rows(order[first : first + batch], np.zeros(batch, np.int64))


def forget(store: Store) -> None:
    """Drops a store from the system's memory, so that the disk is asked again."""
    for shard in range(store.header.shard_count):
        file = os.open(shard_files.shard_path(store.path, shard), os.O_RDONLY)
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(file)


class Disk:
    """Rows of a store by plain reads of several threads at once: as many as the disk gives."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._bytes = int(np.prod(store.header.factor)) * DTYPES[DTYPE].itemsize
        paths = [shard_files.shard_path(store.path, shard) for shard in range(store.header.shard_count)]
        self._files = [os.open(path, os.O_RDONLY) for path in paths]
        self._firsts = [head.places[shard_files.FACTORS].first for head in store.heads]
        for file in self._files:
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_RANDOM)
        self._threads = ThreadPoolExecutor(_PASSED_BY)

    def read(self, rows: Rows) -> int:
        """Bytes of a batch."""
        return sum(self._threads.map(self._read_some, np.array_split(rows.images, _PASSED_BY)))

    def _read_some(self, images: np.ndarray) -> int:
        found = 0
        for image in images.tolist():
            shard, row = divmod(image, self._store.header.shard_images)
            found += len(os.pread(self._files[shard], self._bytes, self._firsts[shard] + row * self._bytes))
        return found

    def close(self) -> None:
        self._threads.shutdown()
        for file in self._files:
            os.close(file)
