"""Photographs read while they are needed: decoded, cut and mirrored in processes of their own, ahead of the step.

What an epoch draws follows from seed, epoch and place alone, whatever the number of readers and of training
processes; a file that cannot be decoded is counted, said and replaced by the next one.
"""

import gc
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache
from multiprocessing.util import Finalize
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ftfast.distill import crops, gpu_decoding
from ftfast.distill.data import Normalisation
from ftfast.distill.datasets import DataError, default_folder
from ftfast.distill.errors import SettingsError
from ftfast.distill.images import WHOLE, Images, Part, steps_of
from ftfast.distill.interrupts import SIGNALS
from ftfast.distill.photographs import TEST, TRAIN, Files, Photographs, list_photographs
from ftfast.distill.synthetic import Synthetic

# torchvision's and timm's models were trained on images normalised by these, of ImageNet's training images.
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
FEWEST_DAMAGED, DAMAGED_SHARE = 10, 0.01  # as many are borne with in a pass; the larger of the two
SHOWN_DAMAGED = 5
MOST_WORKERS = 16
_TRIES = 20


@dataclass(frozen=True)
class Reading:
    """How photographs become tensors.

    Attributes:
        size: pixels of their side.
        workers: reading processes; 0 reads between the steps.
        rand_augment: magnitude of RandAugment (Cubuk et al. 2020), 0 for none.
        on_device: decode, cut and mirror on the device.
        report: takes a line on files that cannot be read.
    """

    size: int
    device: torch.device
    workers: int
    rand_augment: int = 0
    on_device: bool = False
    report: Callable[[str], None] = lambda _: None


Key = tuple[int, int, int] | int | crops.Cut | crops.Views
"""Seed, epoch and number of a photograph to train on; the number alone of one to test on; or boxes that are given."""


class Squares(NamedTuple):
    """Views of photographs ``[..., V, 3, size, size]`` uint8 and their boxes ``[..., V, 5]`` int32."""

    pixels: Tensor
    boxes: Tensor


@dataclass
class _Reader(Dataset[Any]):
    """One photograph after the other, in a process without the device."""

    files: Files
    labels: np.ndarray
    size: int
    rand_augment: int
    as_bytes: bool

    def __getitem__(self, key: Key) -> tuple[Any, int, list[str]]:
        """Pixels ``[3, size, size]`` uint8, or what they are decoded from, label, and the damaged files on the way."""
        index = _number(key)
        damaged: list[str] = []
        for _ in range(min(_TRIES, len(self.labels))):
            try:
                content = gpu_decoding.Encoded.of(self.files.read(index), self.files.name(index))
                found: Any = self._encoded(content, key) if self.as_bytes else self._pixels(content, key)
                return found, int(self.labels[index]), damaged
            except (RuntimeError, ValueError, OSError):
                damaged.append(self.files.name(index))
                index = (index + 1) % len(self.labels)
        raise DataError(f"{len(damaged)} photographs one after the other cannot be decoded, the first {damaged[0]}.")

    def _box(self, content: "gpu_decoding.Encoded", key: Key) -> crops.Box | None:
        if isinstance(key, int):
            return None
        if isinstance(key, crops.Cut):
            return key.box
        torch.manual_seed(crops.sample_seed(*key))
        return crops.draw_box(content.height, content.width)

    def _encoded(self, content: "gpu_decoding.Encoded", key: Key) -> Any:
        return content, self._box(content, key)

    def _pixels(self, content: "gpu_decoding.Encoded", key: Key) -> Tensor | Squares:
        photograph = content.decode()
        if isinstance(key, crops.Views):
            drawn = [self._box(content, (key.seed, view, key.row)) for view in range(key.boxes)]
            boxes = [box for box in drawn if box is not None]
            cuts = [crops.cut_box(photograph, box, self.size) for box in boxes]
            return Squares(torch.stack(cuts), torch.tensor(boxes, dtype=torch.int32))
        box = self._box(content, key)
        if box is None:
            return crops.cut_middle(photograph, self.size)
        square = crops.cut_box(photograph, box, self.size)
        if not self.rand_augment:
            return square
        from torchvision.transforms import v2

        return v2.RandAugment(magnitude=self.rand_augment)(square)


class _Keys:
    """The batches of keys that a loader reads next; set anew for every pass."""

    def __init__(self) -> None:
        self.batches: Callable[[], Iterator[list[Any]]] = lambda: iter(())

    def __iter__(self) -> Iterator[list[Any]]:
        return self.batches()


def _number(key: Key) -> int:
    if isinstance(key, int):
        return key
    return key.row if isinstance(key, crops.Cut | crops.Views) else key[2]


def _collate(samples: list[tuple[Any, int, list[str]]]) -> tuple[Any, Tensor, list[str]]:
    found, labels, damaged = zip(*samples, strict=True)
    pixels: Any = torch.stack(found) if isinstance(found[0], Tensor) else list(found)
    if isinstance(found[0], Squares):
        pixels = Squares(*(torch.stack(parts) for parts in zip(*found, strict=True)))
    return pixels, torch.tensor(labels), [name for names in damaged for name in names]


@dataclass(frozen=True)
class Streamed:
    """Photographs of a folder or of shards; see :class:`ftfast.distill.images.Images`.

    Attributes:
        rows: which of the photographs, in order.
    """

    photographs: Photographs
    reading: Reading
    rows: np.ndarray
    _loaders: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    @property
    def test_batch_size(self) -> int:
        return 250

    def __len__(self) -> int:
        return len(self.rows)

    def draw(
        self, batch_size: int, *, seed: int, epoch: int, first_step: int = 0, part: Part = WHOLE
    ) -> Iterator[tuple[Tensor, ...]]:
        """See :meth:`ftfast.distill.images.Images.draw`.

        Raises:
            DataError: too many files that cannot be decoded, or a reading process that is gone.
        """

        def keys() -> Iterator[list[Key]]:
            order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))
            for batch in order.tensor_split(steps_of(len(self), batch_size))[first_step:]:
                own = batch.tensor_split(part.ranks)[part.rank].numpy()
                yield [(seed, epoch, row) for row in self.rows[own].tolist()]

        yield from self._read("draw", keys)

    def cut_boxes(self, batches: Iterable[list[crops.Cut]]) -> Iterator[tuple[Tensor, ...]]:
        """The boxes of each batch, images ``[N, 3, size, size]`` as :meth:`draw` has them, and labels."""
        yield from self._read("draw", lambda: iter(batches))

    def draw_views(self, batches: Iterable[list[crops.Views]]) -> Iterator[tuple[Tensor, ...]]:
        """Images ``[N * V, 3, size, size]``, an image's views one after the other, labels and boxes ``[N, V, 5]``."""
        yield from self._read("views", lambda: iter(batches))

    def in_order(self, batch_size: int, part: Part = WHOLE) -> Iterator[tuple[Tensor, Tensor]]:
        """The middle of every photograph, with its label; of several processes, each takes its own."""
        own = np.array_split(self.rows, part.ranks)[part.rank]
        batches = [own[start : start + batch_size].tolist() for start in range(0, len(own), batch_size)]
        for images, labels, *_ in self._read("in order", lambda: iter(batches)):
            yield images, labels

    def cut(self, count: int) -> tuple[Self, Self]:
        """``count`` photographs with every class in proportion, the same ones at every call, and the rest."""
        from sklearn.model_selection import train_test_split

        if count == len(self):
            return self, self.at(self.rows[:0])
        labels = self.photographs.labels[self.rows]
        chosen, rest = train_test_split(self.rows, train_size=count, stratify=labels, random_state=0)
        return self.at(np.sort(chosen)), self.at(np.sort(rest))

    def close(self) -> None:
        """Ends the reading processes, which take no signal; the next pass starts others."""
        self._loaders.clear()
        gc.collect()  # the loader's iterator, which ends them, may hang on a cycle

    def at(self, rows: np.ndarray) -> Self:
        """Those of some rows of the photographs."""
        return replace(self, rows=rows, _loaders={})

    def _read(self, kind: str, keys: Callable[[], Iterator[list[Any]]]) -> Iterator[tuple[Tensor, ...]]:
        if not len(self):
            return
        loader, batches = self._loader(kind)
        batches.batches = keys
        damaged: set[str] = set()
        for pixels, labels, names, *boxes in _ahead(_in_words(loader), self._to_device):
            for name in names:
                if name not in damaged and len(damaged) < SHOWN_DAMAGED:
                    self.reading.report(f"warning: {name} cannot be decoded; the next one is taken in its place")
                damaged.add(name)
            if len(damaged) > max(FEWEST_DAMAGED, DAMAGED_SHARE * len(self)):
                raise DataError(
                    f"{len(damaged)} of {len(self)} photographs cannot be decoded, more than {DAMAGED_SHARE:.0%}; the "
                    f"last is {names[-1]}: check the files in --data-dir."
                )
            yield pixels, labels, *boxes
        if len(damaged) > SHOWN_DAMAGED:
            self.reading.report(f"warning: {len(damaged)} photographs of this pass cannot be decoded")

    def _loader(self, kind: str) -> tuple[Any, _Keys]:
        """Training's processes stay from epoch to epoch; those of a test end with it."""
        if kind in self._loaders:
            return self._loaders[kind]
        reading, keys = self.reading, _Keys()
        if reading.workers:
            _end_readers_at_exit()
        reader = _Reader(
            self.photographs.files, self.photographs.labels, reading.size, reading.rand_augment, reading.on_device
        )
        loader = DataLoader(
            reader,
            batch_sampler=keys,
            num_workers=reading.workers,
            worker_init_fn=_ignore_signals,
            collate_fn=_collate,
            pin_memory=reading.device.type == "cuda" and not reading.on_device,
            persistent_workers=kind == "draw" and reading.workers > 0,
            prefetch_factor=4 if reading.workers else None,
        )
        if kind == "draw":
            self._loaders[kind] = (loader, keys)
        return loader, keys

    def _to_device(self, read: tuple[Any, Tensor, list[str]]) -> tuple[Any, ...]:
        found, labels, names = read
        boxes = (found.boxes,) if isinstance(found, Squares) else ()
        if isinstance(found, Squares):
            found = found.pixels.flatten(0, 1)
        device = self.reading.device
        if self.reading.on_device:
            found, labels, also = gpu_decoding.decode_batch(found, labels, self.reading.size, device)
            names = [*names, *also]
        pixels = found.to(device, non_blocking=True)
        images = _normalisation(device).apply(pixels).contiguous(memory_format=torch.channels_last)
        return images, labels.to(device, non_blocking=True), names, *boxes


def _normalisation(device: torch.device) -> Normalisation:
    return Normalisation.of(255, MEAN, DEVIATION).to(device)


def _in_words(loader: Any) -> Iterator[Any]:
    """What a reading process says, as one sentence without its traceback."""
    try:
        with lost_readers_in_words():
            try:
                yield from loader
            except (OSError, EOFError) as error:  # its batch lies in memory that went with it
                raise RuntimeError(f"DataLoader worker: {error}") from None
    except DataError as error:
        raise DataError(
            str(error).strip().splitlines()[-1].removeprefix(f"{DataError.__module__}.DataError: ")
        ) from None


@contextmanager
def lost_readers_in_words() -> Iterator[None]:
    """torch tells of a reading process that is gone by an error wherever the training then is.

    Raises:
        DataError: it did.
    """
    try:
        yield
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise DataError(
            "a reading process is gone, as where the system lacks memory "
            f"({str(error).strip().splitlines()[0].rstrip('.')}); go on with --resume and fewer --workers."
        ) from None


@lru_cache
def _end_readers_at_exit() -> None:
    """At the latest: they take no signal, so a process that left some behind would wait for them for ever."""
    Finalize(None, _kill_readers, exitpriority=10)


def _kill_readers() -> None:
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()


def _ignore_signals(_worker: int) -> None:
    """A signal is for the training process, which saves and then ends its readers."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


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
) -> tuple[Images, Images]:
    """The photographs to train on and to test on.

    Args:
        loader: ``"folder"``, ``"gpu"``, ``"webdataset"`` or ``"synthetic"``.
        workers: reading processes; -1 for this process's share of the processors.
        classes, train_images, test_images: what there is; fewer images are a cut with every class in proportion.
        report: takes a line on files that cannot be read.

    Raises:
        DataError: not there, or fewer than wanted.
        SettingsError: a loader that this machine cannot run.
    """
    if loader == "synthetic":
        train, test = (Synthetic.of(image_size, classes, count, device) for count in (train_images, test_images))
        return train, test
    on_device = loader == "gpu"
    if on_device and device.type != "cuda":
        raise SettingsError("loader is 'gpu', and the device is no GPU; take --loader folder.")
    if on_device and rand_augment:
        raise SettingsError("rand_augment is given, and --loader gpu has no RandAugment; take --loader folder.")
    count = _workers() if workers < 0 else workers
    reading = Reading(image_size, device, count, rand_augment, on_device, report)
    parts: list[Images] = []
    for part, wanted in ((TRAIN, train_images), (TEST, test_images)):
        found = list_photographs(folder or default_folder(), loader, part)
        whole = Streamed(
            found, reading if part == TRAIN else replace(reading, rand_augment=0), np.arange(len(found.labels))
        )
        if wanted > len(whole):
            raise DataError(f"{folder} has {len(whole)} photographs in {part}, fewer than the {wanted} asked for.")
        parts.append(whole.cut(wanted)[0])
    return parts[0], parts[1]


def _workers() -> int:
    on_machine = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, min(MOST_WORKERS, len(os.sched_getaffinity(0)) // on_machine))
