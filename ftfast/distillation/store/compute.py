"""The content of shards: the frozen teacher and paraphraser on the views of each shard's images; and, before it
is begun, how large the store will be and how long it takes.
"""

import shutil
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from rich.filesize import decimal
from torch import Tensor

from ftfast.distillation.data.stored_views import ViewedImages
from ftfast.distillation.phases.trainable import TeacherSide
from ftfast.distillation.store.header import Header
from ftfast.distillation.store.shard_files import DTYPES, LOGITS_DTYPE, tensors_of
from ftfast.distillation.store.teacher_side import factors_of
from ftfast.distillation.training.step.step import Precision


@dataclass(frozen=True)
class ShardMaker:
    """Makes shards, each from its own images alone, in batches that begin anew with it."""

    header: Header
    images: ViewedImages
    teacher_side: TeacherSide
    precision: Precision

    def batches(self, shards: Iterable[int]) -> Iterator[np.ndarray]:
        """The rows of each batch of some shards."""
        for shard in shards:
            rows = self.header.rows_of(shard)
            for first in rows[:: self.header.batch_size]:
                yield np.arange(first, min(first + self.header.batch_size, rows.stop))

    def compute(self, batches: Iterable[np.ndarray]) -> Iterator[dict[str, Tensor]]:
        """The tensors of each batch of rows, on the CPU.

        Raises:
            StoreError: factors or logits that are not finite.
        """
        header = self.header
        for images, labels, boxes in self.images.draw(batches, header.views, header.seed):
            factors, logits = factors_of(self.teacher_side, self.precision, images)
            yield tensors_of(factors, logits if header.classes else None, boxes, labels, DTYPES[header.dtype])

    def make(self, shards: list[int]) -> Iterator[tuple[int, dict[str, Tensor]]]:
        """Each shard and its tensors; images are read ahead across the borders of shards."""
        computed = self.compute(self.batches(shards))
        for shard in shards:
            count = -(-len(self.header.rows_of(shard)) // self.header.batch_size)
            batches = [next(computed) for _ in range(count)]
            yield shard, {name: torch.cat([batch[name] for batch in batches]).contiguous() for name in batches[0]}


_TRIAL_BATCHES, _TRIAL_SECONDS = 8, 2.0


class Estimate(NamedTuple):
    """What is left to do: images, bytes, seconds; and the bytes that are free."""

    images: int
    bytes: int
    seconds: float
    free: int


def image_bytes(header: Header) -> int:
    """Bytes of an image in a store, all views together."""
    channels, height, width = header.factor
    factor = channels * height * width * DTYPES[header.dtype].itemsize
    return header.views * (factor + 5 * 4 + header.classes * LOGITS_DTYPE.itemsize) + 8


def estimate(path: Path, maker: ShardMaker, left: list[int], processes: int) -> Estimate:
    """Measures a few batches of the shards that are left."""
    images = sum(len(maker.header.rows_of(shard)) for shard in left)
    nearest = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
    seconds = _seconds_for_an_image(maker, left) * images / processes if left else 0.0
    return Estimate(images, images * image_bytes(maker.header), seconds, shutil.disk_usage(nearest).free)


def _seconds_for_an_image(maker: ShardMaker, left: list[int]) -> float:
    """The first batch warms up, and counts only where there is no other."""
    batches = list(maker.batches(left[:1]))[:_TRIAL_BATCHES]
    start = warm = time.perf_counter()
    count = 0
    for place, _ in enumerate(maker.compute(iter(batches))):
        now = time.perf_counter()
        if place:
            count += len(batches[place])
        else:
            warm = now
        if now - warm > _TRIAL_SECONDS:
            break
    now = time.perf_counter()
    return (now - warm) / count if count else (now - start) / len(batches[0])


def describe(header: Header) -> str:
    """What a store holds, in a line."""
    logits = f" and {header.classes} logits" if header.classes else ""
    whole = decimal(header.images * image_bytes(header))
    return (
        f"{header.images:,} images x {header.views} view{'s' * (header.views > 1)}, factors "
        f"{'x'.join(map(str, header.factor))} in {header.dtype}{logits}: {whole} in "
        f"{header.shard_count} shard{'s' * (header.shard_count > 1)}"
    )


def describe_work(found: Estimate) -> str:
    """What is left to do, in a line."""
    seconds = timedelta(seconds=round(found.seconds))
    return f"to do: {found.images:,} images, {decimal(found.bytes)}, about {seconds}; {decimal(found.free)} free"
