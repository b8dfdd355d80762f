"""The content of shards: the frozen teacher and paraphraser on the views of each shard's images."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ftfast.distill.data.stored_views import ViewedImages
from ftfast.distill.phases.trainable import Guides
from ftfast.distill.store.guides import factors_of
from ftfast.distill.store.header import Header
from ftfast.distill.store.quantise import DTYPES, quantise
from ftfast.distill.store.read import LOGITS_DTYPE
from ftfast.distill.store.shard_files import FACTORS, LABELS, LOGITS, VIEWS
from ftfast.distill.training.step import Precision
from ftfast.errors import StoreError


@dataclass(frozen=True)
class ShardMaker:
    """Makes shards, each from its own images alone, in batches that begin anew with it."""

    header: Header
    images: ViewedImages
    guides: Guides
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
            factors, logits = factors_of(self.guides, self.precision, images)
            made = {FACTORS: quantise(factors, DTYPES[header.dtype])}
            is_finite = torch.isfinite(factors).all()
            if header.classes:
                made[LOGITS] = logits.to(LOGITS_DTYPE)
                is_finite &= torch.isfinite(made[LOGITS]).all()
            if not bool(is_finite):
                raise StoreError(
                    "the teacher or the paraphraser gives numbers that are not finite, or logits beyond float16; look "
                    "at the run that trained them, or leave --logits out."
                )
            views = {name: tensor.unflatten(0, (-1, header.views)).cpu() for name, tensor in made.items()}
            yield {**views, VIEWS: boxes.cpu(), LABELS: labels.cpu()}

    def make(self, shards: list[int]) -> Iterator[tuple[int, dict[str, Tensor]]]:
        """Each shard and its tensors; images are read ahead across the borders of shards."""
        computed = self.compute(self.batches(shards))
        for shard in shards:
            count = -(-len(self.header.rows_of(shard)) // self.header.batch_size)
            parts = [next(computed) for _ in range(count)]
            yield shard, {name: torch.cat([part[name] for part in parts]).contiguous() for name in parts[0]}
