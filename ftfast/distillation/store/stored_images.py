"""Training images that come with what a store holds of them; see :class:`ftfast.distillation.data.images.Images`.

A thread makes the next batches while a step runs.
"""

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from typing import Self, TypeVar

import numpy as np
import torch
from torch import Tensor

from ftfast.distillation.data.images import Images
from ftfast.distillation.data.photographs import crops
from ftfast.distillation.data.stored_views import ViewedImages, sent
from ftfast.distillation.runtime.processes import WHOLE, Part
from ftfast.distillation.store.read import Rows, Store

Given = TypeVar("Given")
Made = TypeVar("Made")


def make_ahead(make: Callable[[Given], Made], given: Iterable[Given], depth: int = 4) -> Generator[Made]:
    """``map(make, given)``, of which a thread makes ``depth`` ahead; closed, it waits for what is being made."""
    with ThreadPoolExecutor(1, thread_name_prefix="factor reader") as thread:
        waiting: deque[Future[Made]] = deque()
        try:
            for one in given:
                waiting.append(thread.submit(make, one))
                if len(waiting) > depth:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


@dataclass(frozen=True)
class StoredImages(Images):
    """The images of some rows of a store, in one of its views in each epoch, with factors and logits.

    Attributes:
        viewed: all the images that the store is of.
        rows: which of them, in order.
    """

    viewed: ViewedImages
    store: Store
    rows: np.ndarray
    device: torch.device

    @classmethod
    def of(cls, viewed: ViewedImages, store: Store, device: torch.device) -> Self:
        """All of a store's images."""
        return cls(viewed, store, np.arange(store.header.images), device)

    @property
    def test_batch_size(self) -> int:
        return self.viewed.images.test_batch_size

    def __len__(self) -> int:
        return len(self.rows)

    def draw(
        self, batch_size: int, *, seed: int, epoch: int, first_step: int = 0, part: Part = WHOLE
    ) -> Iterator[tuple[Tensor, ...]]:
        """Images, labels, factors ``[N, C, H, W]`` and, where the store has them, logits ``[N, classes]``.

        An image's first view follows from seed and image; every epoch takes the next one, so that as many epochs as
        there are views see each once. The factors are read ahead of the step by a thread, which has ended when this
        has.

        Raises:
            StoreError: a shard that cannot be read.
        """
        own = [self.rows[places.numpy()] for places in self.shuffled(batch_size, seed, epoch, first_step, part)]

        def batches() -> Iterator[Rows]:
            return (Rows(images, self._views(images, seed, epoch)) for images in own)

        boxes = ((rows.images, self.store.boxes[rows.images, rows.views]) for rows in batches())
        read = partial(self.store.read, pinned=self.device.type == "cuda")
        with closing(make_ahead(read, batches())) as ahead:
            for images, stored in zip(self.viewed.cut(boxes), ahead, strict=True):
                yield *images, *(sent(tensor, self.device) for tensor in stored)

    def _views(self, images: np.ndarray, seed: int, epoch: int) -> np.ndarray:
        views = np.uint64(self.store.header.views)
        return ((crops.sample_seeds(seed, 0, images) % views + np.uint64(epoch)) % views).astype(np.int64)

    def in_order(self, batch_size: int, part: Part = WHOLE) -> Iterator[tuple[Tensor, Tensor]]:
        """The images as they are tested, without what is stored."""
        return self.viewed.images.at(self.rows).in_order(batch_size, part)

    def damaged(self) -> int:
        return self.viewed.images.damaged()

    def check_damage_limit(self, count: int) -> None:
        self.viewed.images.check_damage_limit(count)

    def close(self) -> None:
        """Ends what reads images ahead and closes the store's files."""
        self.viewed.images.close()
        self.store.close()

    def row_labels(self) -> np.ndarray:
        return self.viewed.labels[self.rows]

    def at(self, rows: np.ndarray) -> Self:
        return replace(self, rows=self.rows[rows])
