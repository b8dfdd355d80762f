"""A factor store as a data set of torch's: factors beside the images that they are of."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from ftfast.distill.store.read import PARAPHRASER, Rows, Store
from ftfast.distill.store.shard_files import LABELS, read_whole, shard_path
from ftfast.errors import StoreError
from ftfast.modules import Paraphraser

UNKNOWN = -1  # a label that was not given


class FactorStore(Dataset[Any]):
    """A factor store, read in a loop of one's own: no teacher runs there.

    Item ``i`` is the tuple of what ``images[i]`` gives, the factor ``[C, H, W]`` in the store's dtype, which the head
    takes as ``teacher_factor``, and the logits ``[classes]`` where the store has them. A DataLoader reads a whole batch
    at once, shuffled or not, in workers or without.

    Args:
        path: of a store that :func:`ftfast.write_factors` or ``ftfast store build`` made.
        images: the data set whose factors they are, in the same order and with the same transform; its items are
            images, or tuples that begin with image and label. None gives the factors alone.
        view: of a store of several.

    Raises:
        StoreError: no finished store, of another number of images, or without such a view; from an item, a label that
            differs from the stored one.
    """

    def __init__(self, path: str | Path, images: Any = None, *, view: int = 0) -> None:
        self._store = Store(Path(path))
        header = self._store.header
        if images is not None and len(images) != header.images:
            raise StoreError(f"images has {len(images)} items, and the store {path} is of {header.images}.")
        if not 0 <= view < header.views:
            raise StoreError(f"view is {view}; the store {path} has {header.views}, counted from 0.")
        self.images, self.view = images, view
        labels = [
            read_whole(shard_path(self._store.path, shard), head, LABELS, np.dtype("<i8"))
            for shard, head in enumerate(self._store.heads)
        ]
        self._labels = np.concatenate(labels)

    def __len__(self) -> int:
        return self._store.header.images

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[Any, ...]]:
        """The items of a batch, which a DataLoader asks for at once."""
        rows = np.array([range(len(self))[index] for index in indices], dtype=np.int64)
        stored = zip(*self._store.read(Rows(rows, np.full_like(rows, self.view))), strict=True)
        if self.images is None:
            return list(stored)
        return [(*self._image(row), *found) for row, found in zip(rows.tolist(), stored, strict=True)]

    def _image(self, row: int) -> tuple[Any, ...]:
        item = self.images[row]
        item = tuple(item) if isinstance(item, tuple | list) else (item,)
        label = self._labels[row]
        if len(item) > 1 and label != UNKNOWN and int(item[1]) != label:
            raise StoreError(
                f"image {row} has label {int(item[1])}, and {label} in the store {self._store.path}; give the images "
                "in the order in which the store was written."
            )
        return item

    def paraphraser(self) -> Paraphraser:
        """The store's own, frozen and in eval: what :class:`ftfast.FactorTransfer` takes beside a translator.

        Raises:
            StoreError: it is damaged.
        """
        kept = self._store.checkpoint_of(PARAPHRASER)
        model = kept.description["model"]
        norm = "batch" if "norm.0.weight" in kept.tensors else None
        paraphraser = Paraphraser(model["in_channels"], factor_channels=model["factor_channels"], norm=norm)
        paraphraser.load_state_dict(kept.tensors)
        return paraphraser.requires_grad_(False).eval()
