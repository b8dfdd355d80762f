"""Processes that read, decode and cut photographs ahead of the step, and what becomes of those that are lost."""

import errno
import multiprocessing
import signal
import sys
import time
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from multiprocessing.util import Finalize
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torch.utils.data._utils import signal_handling

from ftfast.distill.data.datasets import DataError
from ftfast.distill.data.photographs import crops
from ftfast.distill.data.photographs.decoding import IMAGENET, Colours, Encoded, Read
from ftfast.distill.data.photographs.listing import Files
from ftfast.distill.runtime.signals import SIGNALS

_TRIES = 20
_SECONDS_TO_ANOTHER_TRY = 0.2
BATCHES_AHEAD = 4  # of each process

Key = tuple[int, int, int] | int | crops.Cut | crops.Views
"""Seed, epoch and number of a photograph to train on; the number alone of one to test on; or boxes that are given."""


class Squares(NamedTuple):
    """Views of photographs ``[..., V, 3, size, size]`` uint8 and their boxes ``[..., V, 5]`` int32."""

    pixels: Tensor
    boxes: Tensor


@dataclass
class Reader(Dataset[Any]):
    """One photograph after the other, without the device."""

    files: Files
    labels: np.ndarray
    size: int
    rand_augment: int = 0
    colours: Colours = IMAGENET  # of those who decode what :meth:`read` gives

    def __getitem__(self, key: Key) -> tuple[Tensor | Squares, int, list[str]]:
        """Pixels ``[3, size, size]`` uint8 or several views, label, and the key's own file where that is damaged.

        Raises:
            DataError: bytes that cannot be had, or too many damaged files one after the other.
        """
        return self._first_whole(key, self._pixels)

    def read(self, key: Key) -> tuple[Read, int, list[str]]:
        """The same before it is decoded; nothing of the process's random state is used, so threads may ask."""
        return self._first_whole(key, lambda content, key: Read(content, self._box(content, key)))

    def _first_whole(self, key: Key, use: Callable[[Encoded, Key], Any]) -> tuple[Any, int, list[str]]:
        index = _number(key)
        damaged: list[str] = []
        for _ in range(min(_TRIES, len(self.labels))):
            content = self._bytes(index)
            try:
                found = use(Encoded.of(content, self.files.name(index)), key)
            except (RuntimeError, ValueError):
                damaged.append(self.files.name(index))
                index = (index + 1) % len(self.labels)
            else:
                # The others on the way have keys of their own, which count them.
                return found, int(self.labels[index]), damaged[:1]
        raise DataError(f"{len(damaged)} photographs one after the other cannot be decoded, the first {damaged[0]}.")

    def _bytes(self, index: int) -> bytes:
        """Tried twice: a disk or server that fails says nothing of the picture, which nothing else can stand in for."""
        try:
            return self.files.read(index)
        except OSError:
            time.sleep(_SECONDS_TO_ANOTHER_TRY)
        try:
            return self.files.read(index)
        except OSError as error:
            advice = (
                "allow more open files (ulimit -n) or give fewer --workers"
                if error.errno in (errno.EMFILE, errno.ENFILE)
                else "see to the disk or server that holds --data-dir"
            )
            raise DataError(
                f"{self.files.name(index)} cannot be read ({error.strerror or error}); {advice}, and go on with "
                "--resume."
            ) from None

    def _box(self, content: Encoded, key: Key) -> crops.Box | None:
        if isinstance(key, int):
            return None
        if isinstance(key, crops.Cut):
            return key.box
        return crops.draw_box(content.height, content.width, crops.sample_seed(*key))

    def _pixels(self, content: Encoded, key: Key) -> Tensor | Squares:
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

        assert not isinstance(key, int | crops.Cut)
        torch.manual_seed(crops.sample_seed(*key))
        return v2.RandAugment(magnitude=self.rand_augment)(square)


def _number(key: Key) -> int:
    if isinstance(key, int):
        return key
    return key.row if isinstance(key, crops.Cut | crops.Views) else key[2]


class Keys:
    """The batches of keys that a loader reads next; set anew for every pass."""

    def __init__(self) -> None:
        self.batches: Callable[[], Iterator[list[Any]]] = lambda: iter(())

    def __iter__(self) -> Iterator[list[Any]]:
        return self.batches()


def loader_of(reader: Reader, keys: Keys, workers: int, *, pinned: bool, persistent: bool) -> Any:
    """Batches of pixels ``[N, 3, size, size]`` uint8, labels and damaged files' names, in the keys' order.

    Args:
        workers: processes; 0 reads in this one.
        pinned: into memory that a GPU copies from by itself.
        persistent: the processes stay when a pass ends.
    """
    if workers:
        _end_readers_at_exit()
    return DataLoader(
        reader,
        batch_sampler=keys,
        num_workers=workers,
        worker_init_fn=_begin,
        collate_fn=_collate,
        pin_memory=pinned,
        persistent_workers=persistent and workers > 0,
        prefetch_factor=BATCHES_AHEAD if workers else None,
    )


def _collate(samples: list[tuple[Any, int, list[str]]]) -> tuple[Tensor | Squares, Tensor, list[str]]:
    found, labels, damaged = zip(*samples, strict=True)
    pixels: Tensor | Squares
    if isinstance(found[0], Squares):
        pixels = Squares(*(torch.stack(parts) for parts in zip(*found, strict=True)))
    else:
        pixels = torch.stack(found)
    return pixels, torch.tensor(labels), [name for names in damaged for name in names]


def in_words(loader: Any) -> Iterator[Any]:
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
        _hear_no_more_of_it()
        raise DataError(
            "a reading process is gone, as where the system lacks memory "
            f"({str(error).strip().splitlines()[0].rstrip('.')}); go on with --resume and fewer --workers."
        ) from None


def _hear_no_more_of_it() -> None:
    """torch's handler would raise for each further reader that ends, wherever this process then is, at its exit too."""
    with suppress(ValueError):  # in another thread than the first there is no handler to take
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal_handling._SIGCHLD_handler_set = False  # the next loader sets it again


@lru_cache
def _end_readers_at_exit() -> None:
    """At the latest: they take no signal, so a process that left some behind would wait for them for ever."""
    Finalize(None, _kill_readers, exitpriority=10)


def _kill_readers() -> None:
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()


def _begin(_worker: int) -> None:
    """Of a reading process: a signal is for the training process, which saves and then ends its readers."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    sys.excepthook = _say_unless_cut_off


def _say_unless_cut_off(kind: type[BaseException], error: BaseException, traceback: types.TracebackType | None) -> None:
    """Python's thread that hands over memory would tell of a training process that hangs up; that one has spoken."""
    if not issubclass(kind, ConnectionError):
        sys.__excepthook__(kind, error, traceback)
