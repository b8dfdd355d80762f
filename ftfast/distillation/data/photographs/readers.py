"""Processes that read, decode and cut photographs ahead of the step, and what becomes of those that are lost."""

import errno
import multiprocessing
import multiprocessing.queues
import os
import re
import shutil
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
from torch._utils import ExceptionWrapper
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, Dataset, default_collate
from torch.utils.data._utils import signal_handling

from ftfast.distillation.data.photographs import crops
from ftfast.distillation.data.photographs.decoding import IMAGENET, Colours, Encoded, Read
from ftfast.distillation.data.photographs.image_files import UndecodableError
from ftfast.distillation.data.photographs.listing import Files
from ftfast.distillation.runtime.signals import SIGNALS
from ftfast.errors import DataError, shown

_TRIES = 20
_SHARED_MEMORY = "/dev/shm"
# How torch's words begin: on an error that a reading process raised, and on a process that is no longer there.
_IN_READER = "in DataLoader worker process"
_OF_READER = re.compile(rf"Caught \w+ {_IN_READER}")
_LOST_READER = re.compile(r"DataLoader worker \(pid")
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
        index = key.row if isinstance(key, crops.Cut | crops.Views) else key if isinstance(key, int) else key[2]
        damaged: list[str] = []
        reason = ""
        for _ in range(min(_TRIES, len(self.labels))):
            content, name = self._bytes(index), self.files.name(index)
            try:
                found = use(Encoded.of(content, name), key)
            except UndecodableError as error:
                damaged.append(name)
                reason = reason or shown(str(error))
                index = (index + 1) % len(self.labels)
            except Exception as error:  # no fault of the file's, which may help to find it all the same
                error.add_note(f"This was at {shown(name)}.")
                raise
            else:
                # The others on the way have keys of their own, which count them.
                return found, int(self.labels[index]), damaged[:1]
        raise DataError(
            f"{len(damaged)} photographs one after the other cannot be decoded, the first {shown(damaged[0])} "
            f"({reason.rstrip('.')})."
        )

    def _bytes(self, index: int) -> bytes:
        """Tried twice: a disk or server that fails says nothing of the picture, which nothing else can stand in for."""
        try:
            with suppress(OSError):
                return self.files.read(index)
            time.sleep(_SECONDS_TO_ANOTHER_TRY)
            return self.files.read(index)
        except OSError as error:
            advice = (
                "allow more open files (ulimit -n) or give fewer --workers"
                if error.errno in (errno.EMFILE, errno.ENFILE)
                else "see to the disk or server that holds --data-dir"
            )
            raise DataError(
                f"{shown(self.files.name(index))} cannot be read ({error.strerror or error}); {advice}, and go on with "
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


def end_readers(loader: Any) -> None:
    """Ends a persistent loader's processes, before the garbage collector takes the queues that tell them of it away."""
    if (iterator := loader._iterator) is not None:
        iterator._shutdown_workers()


def _collate(samples: list[tuple[Any, int, list[str]]]) -> tuple[Tensor | Squares, Tensor, list[str]]:
    """In a reading process into shared memory at once, where its lack can still be said.

    Raises:
        DataError: the shared memory is full.
    """
    found, labels, damaged = zip(*samples, strict=True)
    try:
        pixels = default_collate(list(found))
        return pixels, default_collate(list(torch.tensor(labels))), [name for names in damaged for name in names]
    except RuntimeError as error:
        if "shared memory" not in str(error):
            raise
        raise _shared_memory_is_full(sum(tensor.nbytes for tensor in tree_leaves(found))) from None


def _shared_memory_is_full(batch: int | None = None) -> DataError:
    """What to say of it; ``batch`` is the bytes of one."""
    size, of_batch = "", "" if batch is None else f", where a batch takes {batch / 1e6:.1f} MB"
    with suppress(OSError):
        size = f" ({_SHARED_MEMORY} has {shutil.disk_usage(_SHARED_MEMORY).total / 1e6:.0f} MB)"
    return DataError(
        f"the shared memory in which reading processes hand over batches is full{size}{of_batch}; enlarge it (docker "
        "run --shm-size 8g), give a smaller --batch-size or fewer --workers, or --workers 0, which needs none."
    )


def translate_loader_errors(loader: Any) -> Iterator[Any]:
    """What a reading process says, as one sentence without its traceback; what it did not mean to say, as it is."""
    try:
        with translate_reader_errors():
            try:
                yield from loader
            except (OSError, EOFError) as error:
                if not loader.num_workers or _OF_READER.match(str(error)):
                    raise
                raise _reader_is_gone(error) from None  # its batch lies in memory that went with it
    except DataError as error:
        raise DataError(
            str(error).strip().splitlines()[-1].removeprefix(f"{DataError.__module__}.DataError: ")
        ) from None


@contextmanager
def translate_reader_errors() -> Iterator[None]:
    """torch tells of a reading process that is gone by an error wherever the training then is.

    Raises:
        DataError: it did.
    """
    try:
        yield
    except RuntimeError as error:
        if not _LOST_READER.match(str(error)):
            raise
        raise _reader_is_gone(error) from None


def _reader_is_gone(error: Exception) -> DataError:
    _hear_no_more_of_it()
    reason = str(error).strip().partition("\n")[0].rstrip(".") or type(error).__name__
    if "Bus error" in reason:  # it wrote to shared memory that was promised, and is not there
        return _shared_memory_is_full()
    return DataError(
        f"a reading process is gone, as where the system lacks memory ({reason}); go on "
        "with --resume and fewer --workers."
    )


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
    # A batch that cannot be handed over would be left out without a word, and the training wait for it for ever.
    multiprocessing.queues.Queue._on_queue_feeder_error = _hand_over_why_not  # type: ignore[attr-defined]


def _hand_over_why_not(queue: Any, error: Exception, lacking: Any) -> None:
    """In the place of a batch, by its number."""
    if not isinstance(lacking, tuple):
        os._exit(1)  # nobody knows which it was, and torch says that this process is gone
    advice = "allow more open files (ulimit -n), or give fewer --workers"
    try:
        raise DataError(f"a batch cannot be handed over to the training ({shown(str(error))}); {advice}.")
    except DataError:
        queue.put((lacking[0], ExceptionWrapper(where=_IN_READER)))


def _say_unless_cut_off(kind: type[BaseException], error: BaseException, traceback: types.TracebackType | None) -> None:
    """Python's thread that hands over memory would tell of a training process that hangs up; that one has spoken."""
    if not issubclass(kind, ConnectionError):
        sys.__excepthook__(kind, error, traceback)
