"""Photographs read while they are needed: decoded, cut and mirrored in processes of their own, ahead of the step.

What an epoch draws follows from seed, epoch and place alone, whatever the number of readers and of training
processes; a file that cannot be decoded is counted, said and replaced by the next one.
"""

import gc
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from ftfast.distillation.data.images import Images
from ftfast.distillation.data.photographs.decoding import IMAGENET, Colours, normalise
from ftfast.distillation.data.photographs.gpu_pipeline import decoded_ahead
from ftfast.distillation.data.photographs.listing import LOADERS, TEST, TRAIN, Photographs, list_both
from ftfast.distillation.data.photographs.readers import (
    Key,
    Keys,
    Reader,
    Squares,
    end_readers,
    loader_of,
    translate_loader_errors,
)
from ftfast.distillation.data.source import default_folder
from ftfast.distillation.data.synthetic import Synthetic
from ftfast.distillation.runtime.processes import WHOLE, Part
from ftfast.errors import DataError, SettingsError, shown

# As many are borne with, the larger of the two: of a process's share of a pass, and of all processes' together.
FEWEST_DAMAGED, DAMAGED_SHARE = 10, 0.01
SHOWN_DAMAGED = 5
MOST_WORKERS = 16


@dataclass(frozen=True)
class Reading:
    """How photographs become tensors.

    Attributes:
        size: pixels of their side.
        workers: reading processes; 0 reads between the steps.
        rand_augment: magnitude of RandAugment (Cubuk et al. 2020), 0 for none.
        on_device: decode, cut and mirror on the device, ahead of the step; ``workers`` are threads then, at least one.
        report: takes a line on files that cannot be read.
        colours: to normalise by.
    """

    size: int
    device: torch.device
    workers: int
    rand_augment: int = 0
    on_device: bool = False
    report: Callable[[str], None] = lambda _: None
    colours: Colours = IMAGENET


@dataclass(frozen=True)
class Streamed(Images):
    """Photographs of a folder or of shards.

    Attributes:
        rows: which of the photographs, in order.
    """

    photographs: Photographs
    reading: Reading
    rows: np.ndarray
    _loaders: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)
    _damaged: set[str] = field(default_factory=set, repr=False, compare=False)

    def __len__(self) -> int:
        return len(self.rows)

    def draw(
        self, batch_size: int, *, seed: int, epoch: int, first_step: int = 0, part: Part = WHOLE
    ) -> Iterator[tuple[Tensor, ...]]:
        def keys() -> Iterator[list[Key]]:
            for own in self.shuffled(batch_size, seed, epoch, first_step, part):
                yield [(seed, epoch, row) for row in self.rows[own.numpy()].tolist()]

        yield from self.read("draw", keys, len(self) // part.ranks)

    def in_order(self, batch_size: int, part: Part = WHOLE) -> Iterator[tuple[Tensor, Tensor]]:
        """The middle of every photograph, with its label; of several processes, each takes its own."""
        own = np.array_split(self.rows, part.ranks)[part.rank]
        batches = [own[start : start + batch_size].tolist() for start in range(0, len(own), batch_size)]
        for images, labels, *_ in self.read("in order", lambda: iter(batches), len(own)):
            yield images, labels

    def damaged(self) -> int:
        return len(self._damaged)

    def check_damage_limit(self, count: int) -> None:
        if count > _most_damaged(len(self)):
            raise DataError(
                f"{count} of {len(self)} photographs cannot be decoded, more than {DAMAGED_SHARE:.0%}: check the files "
                "in --data-dir."
            )
        if count:
            self.reading.report(f"warning: {count} of {len(self)} photographs cannot be decoded; others stand in")

    def close(self) -> None:
        """Ends the reading processes, which take no signal; the next pass starts others."""
        for loader, _ in self._loaders.values():
            end_readers(loader)
        self._loaders.clear()
        gc.collect()  # those of a test that was left early may hang on a cycle

    def row_labels(self) -> np.ndarray:
        return self.photographs.labels[self.rows]

    def at(self, rows: np.ndarray) -> Self:
        return replace(self, rows=self.rows[rows], _loaders={}, _damaged=set())

    def read(self, kind: str, keys: Callable[[], Iterator[list[Any]]], count: int) -> Iterator[tuple[Tensor, ...]]:
        """Images ``[N, 3, size, size]`` as :meth:`draw` has them, and labels, of about ``count`` keys.

        Of ``"views"`` images ``[N * V, 3, size, size]``, those of one together, labels and boxes ``[N, V, 5]``.
        """
        damaged = self._damaged
        damaged.clear()
        if not len(self):
            return
        for pixels, labels, names, *boxes in self._batches(kind, keys):
            for name in names:
                if name not in damaged and len(damaged) < SHOWN_DAMAGED:
                    self.reading.report(f"warning: {shown(name)} cannot be decoded; the next one is taken in its place")
                damaged.add(name)
            if len(damaged) > _most_damaged(count):
                raise DataError(
                    f"{len(damaged)} of {count} photographs cannot be decoded, more than {DAMAGED_SHARE:.0%}; the "
                    f"last is {shown(names[-1])}: check the files in --data-dir."
                )
            yield pixels, labels, *boxes

    def _batches(self, kind: str, keys: Callable[[], Iterator[list[Any]]]) -> Iterator[tuple[Any, ...]]:
        """Images and labels on the device, the damaged files' names and, of views, their boxes."""
        if self.reading.on_device and kind != "views":  # several of one file are the processor's
            return decoded_ahead(self._reader(), keys(), self.reading.device, max(1, self.reading.workers))
        loader, batches = self._loader(kind)
        batches.batches = keys
        return _ahead(translate_loader_errors(loader), self._to_device)

    def _reader(self) -> Reader:
        reading = self.reading
        return Reader(
            self.photographs.files, self.photographs.labels, reading.size, reading.rand_augment, reading.colours
        )

    def _loader(self, kind: str) -> tuple[Any, Keys]:
        """Training's processes stay from epoch to epoch; those of a test end with it."""
        if kind in self._loaders:
            return self._loaders[kind]
        keys, is_drawn = Keys(), kind == "draw"
        pinned = self.reading.device.type == "cuda"
        loader = loader_of(self._reader(), keys, self.reading.workers, pinned=pinned, persistent=is_drawn)
        if is_drawn:
            self._loaders[kind] = (loader, keys)
        return loader, keys

    def _to_device(self, read: tuple[Any, Tensor, list[str]]) -> tuple[Any, ...]:
        found, labels, names = read
        device = self.reading.device
        pixels = found.pixels.flatten(0, 1) if isinstance(found, Squares) else found
        boxes = (found.boxes,) if isinstance(found, Squares) else ()
        images = normalise(pixels.to(device, non_blocking=True), self.reading.colours)
        return images, labels.to(device, non_blocking=True), names, *boxes


def _most_damaged(count: int) -> float:
    return max(FEWEST_DAMAGED, DAMAGED_SHARE * count)


def _ahead(batches: Iterator[Any], prepare: Callable[[Any], Any]) -> Iterator[Any]:
    """Each prepared before the one before it is used, so that a GPU's copies run beside its step."""
    waiting: list[Any] = []
    for batch in batches:
        waiting.append(prepare(batch))
        if len(waiting) > 1:
            yield waiting.pop(0)
    yield from waiting


def load(
    folder: Path | None,
    loader: str,
    device: torch.device,
    *,
    image_size: int,
    workers: int,
    rand_augment: int,
    classes: int,
    train_images: int,
    test_images: int,
    report: Callable[[str], None] = lambda _: None,
    colours: Colours = IMAGENET,
) -> tuple[Images, Images]:
    """The photographs to train on and to test on.

    Args:
        loader: one of :data:`ftfast.distillation.data.photographs.listing.LOADERS`.
        workers: reading processes; -1 for this process's share of the processors.
        classes, train_images, test_images: what there is; fewer images are a cut with every class in proportion.
        report: takes a line on files that cannot be read.
        colours: to normalise by.

    Raises:
        DataError: not there, or fewer than wanted.
        SettingsError: a loader that this machine cannot run.
    """
    kind = LOADERS[loader]
    if rand_augment and not kind.has_rand_augment:
        raise SettingsError(
            f"rand_augment is {rand_augment}, and --loader {loader} has no RandAugment; take --loader folder or "
            "webdataset."
        )
    if kind.is_noise:
        train, test = (Synthetic.of(image_size, classes, count, device) for count in (train_images, test_images))
        return train, test
    if kind.on_device and device.type != "cuda":
        raise SettingsError(f"loader is {loader!r}, and the device is no GPU; take --loader folder.")
    count = default_workers() if workers < 0 else workers
    reading = Reading(image_size, device, count, rand_augment, kind.on_device, report, colours)
    folder = folder or default_folder()
    both = list_both(folder, loader)
    if both[0].classes != classes:
        raise DataError(
            f"{shown(str(folder))} has {both[0].classes} classes, and {classes} are asked for; leave --classes out, or "
            "see --data-dir."
        )
    found_images: list[Images] = []
    for split, wanted, listed in zip((TRAIN, TEST), (train_images, test_images), both, strict=True):
        whole = Streamed(
            listed, reading if split == TRAIN else replace(reading, rand_augment=0), np.arange(len(listed.labels))
        )
        if wanted > len(whole):
            raise DataError(
                f"{shown(str(folder))} has {len(whole)} photographs in {split}, fewer than the {wanted} asked for."
            )
        found_images.append(whole.stratified(wanted)[0])
    return found_images[0], found_images[1]


def default_workers() -> int:
    on_machine = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, min(MOST_WORKERS, len(os.sched_getaffinity(0)) // on_machine))
