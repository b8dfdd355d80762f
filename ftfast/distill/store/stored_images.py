"""Training images that come with what a store holds of them; see :class:`ftfast.distill.data.images.Images`. A thread
makes the next batches while a step runs.
"""

import queue
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

import numpy as np
import torch
from torch import Tensor

from ftfast.distill.data.cuts import cut_rows, fold_rows
from ftfast.distill.data.images import steps_of
from ftfast.distill.data.photographs import crops
from ftfast.distill.data.stored_views import ViewedImages, sent
from ftfast.distill.runtime.processes import WHOLE, Part
from ftfast.distill.store.read import Rows, Store, read_batches

Value = TypeVar("Value")
_END = object()
_PATIENCE = 0.1  # seconds between two looks at whether anybody still wants what is made


class Ahead(Generic[Value]):
    """Iterates as ``values`` does, which runs in a thread at most ``depth`` values ahead.

    It is a context: on leaving, the thread has ended. What ``values`` raises is raised where its next value was due.
    """

    def __init__(self, values: Iterator[Value], depth: int = 4) -> None:
        self._values = values
        self._made: queue.Queue[tuple[Any, BaseException | None]] = queue.Queue(depth)
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._make, name="factor reader", daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __iter__(self) -> Iterator[Value]:
        return self

    def __next__(self) -> Value:
        if self._is_over.is_set():
            raise StopIteration
        value, error = self._made.get()
        if error is not None:
            self.close()
            raise error
        if value is _END:
            self.close()
            raise StopIteration
        return value

    def close(self) -> None:
        """Ends the thread; waits for what it is making."""
        self._is_over.set()
        self._thread.join()

    def _make(self) -> None:
        try:
            for value in self._values:
                if not self._put(value, None):
                    return
            self._put(_END, None)
        except BaseException as error:
            self._put(None, error)

    def _put(self, value: Any, error: BaseException | None) -> bool:
        while not self._is_over.is_set():
            try:
                self._made.put((value, error), timeout=_PATIENCE)
                return True
            except queue.Full:
                continue
        return False


@dataclass(frozen=True)
class StoredImages:
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
        # In the order of images without a store.
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))
        wholes = order.tensor_split(steps_of(len(self), batch_size))[first_step:]
        own = [self.rows[whole.tensor_split(part.ranks)[part.rank].numpy()] for whole in wholes]

        def batches() -> Iterator[Rows]:
            return (Rows(images, self._views(images, seed, epoch)) for images in own)

        boxes = ((rows.images, self.store.boxes[rows.images, rows.views]) for rows in batches())
        with Ahead(read_batches(self.store, batches(), pinned=self.device.type == "cuda")) as ahead:
            for images, stored in zip(self.viewed.cut(boxes), ahead, strict=True):
                yield *images, *(sent(tensor, self.device) for tensor in stored)

    def _views(self, images: np.ndarray, seed: int, epoch: int) -> np.ndarray:
        views = np.uint64(self.store.header.views)
        return ((crops.sample_seeds(seed, 0, images) % views + np.uint64(epoch)) % views).astype(np.int64)

    def in_order(self, batch_size: int, part: Part = WHOLE) -> Iterator[tuple[Tensor, Tensor]]:
        """The images as they are tested, without what is stored."""
        return self.viewed.at(self.rows).in_order(batch_size, part)

    def damaged(self) -> int:
        """See :meth:`ftfast.distill.data.images.Images.damaged`."""
        return self.viewed.images.damaged()

    def check_damage_limit(self, count: int) -> None:
        """See :meth:`ftfast.distill.data.images.Images.check_damage_limit`."""
        self.viewed.images.check_damage_limit(count)

    def close(self) -> None:
        """Ends what reads images ahead and closes the store's files."""
        self.viewed.images.close()
        self.store.close()

    def cut(self, count: int) -> tuple[Self, Self]:
        """``count`` images with every class in proportion, the same ones as without a store, and the rest."""
        if count == len(self):
            return self, self._at(np.arange(0))
        chosen, rest = cut_rows(self.viewed.labels[self.rows], count)
        return self._at(chosen), self._at(rest)

    def folds(self, count: int) -> list[tuple[Self, Self]]:
        """See :meth:`ftfast.distill.data.images.Foldable.folds`."""
        cuts = fold_rows(self.viewed.labels[self.rows], count)
        return [(self._at(fitted), self._at(validated)) for fitted, validated in cuts]

    def _at(self, places: np.ndarray) -> Self:
        return replace(self, rows=self.rows[places])
