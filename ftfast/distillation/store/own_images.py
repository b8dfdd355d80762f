"""A store of images of one's own, written in Python from a loader in a fixed order, and read as torch's data sets."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from ftfast.distillation.runtime import checkpoint, files
from ftfast.distillation.runtime.checkpoint import Checkpoint
from ftfast.distillation.store import header as headers
from ftfast.distillation.store import shard_files
from ftfast.distillation.store.header import Header
from ftfast.distillation.store.read import PARAPHRASER, Rows, Store
from ftfast.distillation.store.shard_files import DTYPES, FACTORS, LABELS, LOGITS, shard_path
from ftfast.distillation.training.paraphrasing.feature_batches import images_of, maps_of, taken_by
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
        self._labels = self._store.read_all(LABELS, "<i8")

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


def write_factors(
    path: str | Path,
    teacher: nn.Module,
    paraphraser: Paraphraser,
    loader: Iterable[Any],
    *,
    dtype: str = "int8",
    logits: bool = False,
) -> FactorStore:
    """Writes the factors of all images of a loader, once and for every student, and opens what it wrote.

    The loader must give the images in a fixed order, each as the student will see it (no random crops, no shuffling):
    image ``i`` of the store is its ``i``-th. Nothing is left of a store that was not written to its end.

    Args:
        path: a folder that does not exist yet.
        teacher: images to feature maps, as :class:`ftfast.FrozenTeacher` gives them.
        paraphraser: trained on these features; the store keeps a copy.
        loader: batches of images ``[N, C, H, W]``, or tuples that begin with them; where whole-numbered labels ``[N]``
            come second, they are kept, and compared when the store is read beside a data set.
        dtype: of the factors: ``"int8"``, ``"float8_e4m3fn"``, ``"bfloat16"`` or ``"float16"``. Only a factor's
            direction counts, so no scale is kept.
        logits: keep the teacher's too, in float16; a FrozenTeacher gives them with ``classifier=True``.

    Raises:
        FileExistsError: ``path`` is there already.
        StoreError: no images, no logits where they are wanted, or numbers that are not finite.
        OSError: it cannot be written, as on a full disk.
    """
    if dtype not in DTYPES:
        raise StoreError(f"dtype is {dtype!r}; it takes {', '.join(DTYPES)}.")
    path = Path(path)
    model = {"in_channels": paraphraser.in_channels, "factor_channels": paraphraser.factor_channels}
    kept = Checkpoint(paraphraser.state_dict(), {}, {"kind": "paraphraser", "model": model})
    with files.new_folder(path) as folder:
        batches = _batches(teacher.eval(), paraphraser.eval(), loader, DTYPES[dtype], logits=logits)
        first = next(batches, None)
        if first is None:
            raise StoreError("loader gives no batch; it takes one that gives images.")
        height, width, channels = first[FACTORS].shape[2:]
        factor = (channels, height, width)
        in_a_shard, images = shard_files.images_in_a_shard(1, 0, 1, factor, dtype), 0
        for shard, tensors in enumerate(_shards(chain([first], batches), in_a_shard)):
            shard_files.write_shard(shard_path(folder, shard), tensors)
            images += len(tensors[LABELS])
        checkpoint.save(folder / PARAPHRASER, kept)
        header = Header(
            settings={**dict.fromkeys(headers.TAKEN), "data": headers.OWN},
            hashes={PARAPHRASER: files.hash_tensors(checkpoint.load(folder / PARAPHRASER).tensors)},
            transform={"cut": "images as they were given"},
            images=images,
            views=1,
            factor=factor,
            dtype=dtype,
            computed_in=str(next(paraphraser.parameters()).dtype).removeprefix("torch."),
            classes=first[LOGITS].shape[2] if logits else 0,
            seed=0,
            batch_size=1,
            shard_images=in_a_shard,
        )
        shard_files.finish(folder, header)
    return FactorStore(path)


def _batches(
    teacher: nn.Module, paraphraser: Paraphraser, loader: Iterable[Any], dtype: torch.dtype, *, logits: bool
) -> Iterator[dict[str, Tensor]]:
    """What a shard has of each batch."""
    for batch in loader:
        (images,) = images_of([batch])
        count = len(images)
        labels = None if isinstance(batch, Tensor) or len(batch) < 2 else batch[1]
        if not isinstance(labels, Tensor) or labels.shape != (count,) or labels.is_floating_point():
            labels = torch.full((count,), UNKNOWN)
        factors, said = _computed(teacher, paraphraser, images, logits=logits)
        yield shard_files.tensors_of(factors, said, torch.zeros(count, 1, 5, dtype=torch.int32), labels.long(), dtype)


@torch.no_grad()
def _computed(
    teacher: nn.Module, paraphraser: Paraphraser, images: Tensor, *, logits: bool
) -> tuple[Tensor, Tensor | None]:
    """Factors ``[N, C, H, W]`` and, where they are wanted, logits."""
    found = teacher(images.to(**taken_by(teacher)))
    factors = paraphraser.encode(maps_of(found).to(next(paraphraser.parameters())))
    said = getattr(found, "logits", None) if logits else None
    if logits and (said is None or not said.numel()):
        raise StoreError("logits is True and the teacher gives none; take FrozenTeacher(..., classifier=True).")
    return factors, said


def _shards(batches: Iterable[dict[str, Tensor]], images: int) -> Iterator[dict[str, Tensor]]:
    """The same in pieces of so many images, but for the last one."""
    held: list[dict[str, Tensor]] = []
    for batch in chain(batches, [None]):
        held += [] if batch is None else [batch]
        while held and (batch is None or sum(len(each[LABELS]) for each in held) >= images):
            whole = {name: torch.cat([each[name] for each in held]) for name in held[0]}
            yield {name: tensor[:images].contiguous() for name, tensor in whole.items()}
            rest = {name: tensor[images:] for name, tensor in whole.items()}
            held = [rest] if len(rest[LABELS]) else []
