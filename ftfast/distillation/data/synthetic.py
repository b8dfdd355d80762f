"""Photographs of noise, made once: how fast everything is that comes after a loader."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
import torch
from torch import Tensor

from ftfast.distillation.data.images import Images, size_of, steps_of
from ftfast.distillation.runtime.processes import WHOLE, Part

POOL = 64


@dataclass(frozen=True)
class Synthetic(Images):
    """``count`` images, of which few are unlike; labels go round the classes.

    Attributes:
        pool: ``[POOL, 3, size, size]`` float32, channels_last, on the device.
    """

    pool: Tensor
    classes: int
    count: int

    @classmethod
    def of(cls, size: int, classes: int, count: int, device: torch.device) -> Self:
        """Images drawn anew at every call."""
        pool = torch.randn(POOL, 3, size, size, generator=torch.Generator().manual_seed(0)).to(device)
        return cls(pool.contiguous(memory_format=torch.channels_last), classes, count)

    def __len__(self) -> int:
        return self.count

    def draw(
        self, batch_size: int, *, seed: int, epoch: int, first_step: int = 0, part: Part = WHOLE
    ) -> Iterator[tuple[Tensor, ...]]:
        """There is no order to shuffle."""
        steps = steps_of(self.count, batch_size)
        for step in range(first_step, steps):
            yield self._batch(size_of(size_of(self.count, steps, step), part.ranks, part.rank), step)

    def in_order(self, batch_size: int, part: Part = WHOLE) -> Iterator[tuple[Tensor, Tensor]]:
        """The same images."""
        left, step = size_of(self.count, part.ranks, part.rank), 0
        while left:
            yield self._batch(min(left, batch_size), step)
            left, step = left - min(left, batch_size), step + 1

    def _batch(self, count: int, step: int) -> tuple[Tensor, Tensor]:
        rows = torch.arange(count, device=self.pool.device) + step
        return self.pool[rows % POOL], rows % self.classes

    def row_labels(self) -> np.ndarray:
        return np.zeros(self.count, dtype=np.int64)  # of no class: any of them may be on either side

    def at(self, rows: np.ndarray) -> Self:
        """As many of the images; one is as good as another."""
        return replace(self, count=len(rows))
