"""Photographs decoded, cut and normalised in a thread of their own, ahead of the step and on a stream of their own.

Files are read by further threads, and where the GPU decodes more slowly than it would take them, these decode a share
of every batch on the processor: the share with which both are done at the same time.
"""

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ftfast.distillation.data.photographs.decoding import Encoded, Read, decode_batch, decode_or_none
from ftfast.distillation.data.photographs.readers import Key, Reader

BATCHES_READ_AHEAD = 2
BATCHES_DECODED_AHEAD = 3
PARTS_OF_A_THREAD = 2  # into which each thread's share of a batch is cut, so that a slow one holds up less
SECONDS_BETWEEN_LOOKS = 0.1  # of a thread that waits at whether it is still wanted
_SMOOTHING = 0.3  # of what is learned from one batch


Batch = tuple[Tensor, Tensor, list[str]]
"""Images and labels on the device, which is done with them, and the damaged files' names."""


@dataclass
class Balance:
    """How many photographs of a batch the processor decodes, from seconds a photograph, smoothed over batches.

    Attributes:
        threads: that read, and decode on the processor.
        reading, decoding: of one thread; ``None`` until known.
        on_gpu: of the GPU.
    """

    threads: int
    reading: float | None = None
    decoding: float | None = None
    on_gpu: float | None = None

    def share(self, count: int) -> int:
        """Of ``count`` photographs; a sixteenth at least is tried out until both sides are known."""
        if self.reading is None or self.decoding is None or self.on_gpu is None:
            return min(count, max(1, count // 16))
        # The GPU decodes count - n while every thread reads and decodes its part: (count - n) on_gpu =
        # (count reading + n decoding) / threads.
        of_threads = self.threads * self.on_gpu
        wanted = count * (of_threads - self.reading) / (of_threads + self.decoding)
        return max(0, min(count - 1, round(wanted)))

    def learn(self, name: str, seconds: float, photographs: int) -> None:
        """Takes what one batch took; the first one, of which the GPU sets up its decoder, is forgotten soon."""
        if photographs:
            before, now = getattr(self, name), seconds / photographs
            setattr(self, name, now if before is None or now < before / 4 else before + _SMOOTHING * (now - before))


class _Part(NamedTuple):
    """Part of a batch as one thread has read it."""

    photographs: list[tuple[Read, int, list[str]]]
    reading: float
    decoding: float
    decoded: int


def decoded_ahead(reader: Reader, batches: Iterable[list[Key]], device: torch.device, threads: int) -> Iterator[Batch]:
    """Images ``[N, 3, size, size]`` float32, normalised and channels_last, labels, and the damaged files' names.

    The current stream has them. A pass that is left early ends its threads.

    Args:
        threads: that read files, at least 1.

    Raises:
        DataError: photographs that cannot be decoded, one after the other or a whole batch of them.
    """
    decoded: queue.Queue[Any] = queue.Queue(BATCHES_DECODED_AHEAD)
    ended = threading.Event()
    index = torch.cuda.current_device() if device.type == "cuda" and device.index is None else device.index
    own = torch.device(device.type, index) if device.type == "cuda" else device
    thread = threading.Thread(
        target=_decode_all, args=(reader, iter(batches), own, threads, decoded, ended), name="decoding", daemon=True
    )
    thread.start()
    try:
        while True:
            found = decoded.get()
            if found is None:
                return
            if isinstance(found, BaseException):
                raise found
            if own.type == "cuda":
                for tensor in found[:2]:
                    tensor.record_stream(torch.cuda.current_stream(own))
            yield found
    finally:
        ended.set()
        thread.join()


def _decode_all(
    reader: Reader,
    batches: Iterator[list[Key]],
    device: torch.device,
    threads: int,
    decoded: "queue.Queue[Any]",
    ended: threading.Event,
) -> None:
    """The thread's work: puts each batch, then None or the error that ended it."""
    last: BaseException | None = None
    try:
        with ExitStack() as stack:
            stream, start = None, None
            if device.type == "cuda":
                start = partial(torch.cuda.set_device, device)  # which every thread has one of
                start()
                stream = torch.cuda.Stream(device)
                stack.enter_context(torch.cuda.stream(stream))
            pool = ThreadPoolExecutor(threads, thread_name_prefix="reading", initializer=start)
            stack.callback(lambda: pool.shutdown(wait=True, cancel_futures=True))
            for batch in _decoded(reader, batches, device, stream, pool, threads):
                if not _put(decoded, batch, ended):
                    break
    except BaseException as error:
        last = error
    _put(decoded, last, ended)


def _put(decoded: "queue.Queue[Any]", item: Any, ended: threading.Event) -> bool:
    """Whether it was still wanted."""
    while not ended.is_set():
        try:
            decoded.put(item, timeout=SECONDS_BETWEEN_LOOKS)
            return True
        except queue.Full:
            continue
    return False


def _decoded(
    reader: Reader,
    batches: Iterator[list[Key]],
    device: torch.device,
    stream: torch.cuda.Stream | None,
    pool: ThreadPoolExecutor,
    threads: int,
) -> Iterator[Batch]:
    balance = Balance(threads)
    waiting: deque[list[Future[_Part]]] = deque()

    def begin_reading() -> None:
        keys = next(batches, None)
        if keys is not None:
            on_processor = balance.share(len(keys)) if stream is not None else 0
            waiting.append(_begin(reader, keys, pool, threads * PARTS_OF_A_THREAD, on_processor))

    def on_processor(decode: Callable[[Encoded], Tensor | None], left: list[Encoded]) -> Iterable[Tensor | None]:
        return pool.map(decode, left)

    for _ in range(BATCHES_READ_AHEAD):
        begin_reading()
    while waiting:
        parts = [future.result() for future in waiting.popleft()]
        read = [photograph for part in parts for photograph in part.photographs]
        processor = sum(part.decoded for part in parts)
        balance.learn("reading", sum(part.reading for part in parts), len(read))
        balance.learn("decoding", sum(part.decoding for part in parts), processor)
        begin_reading()
        begin = time.perf_counter()
        labels = torch.tensor([label for _, label, _ in read])
        images, labels, damaged = decode_batch(
            [photograph for photograph, _, _ in read], labels, reader.size, device, on_processor, reader.colours
        )
        names = [name for photograph, _, of_one in read for name in of_one or _damaged_of(photograph, damaged)]
        labels = labels.to(device)
        if stream is not None:
            # nvJPEG writes on a stream of its own, into memory that this one may still read: it has to wait.
            stream.synchronize()
            if not damaged:
                balance.learn("on_gpu", time.perf_counter() - begin, len(read) - processor)
        yield images, labels, names


def _damaged_of(photograph: Read, damaged: list[str]) -> list[str]:
    """A photograph's own name, where it is among the damaged ones."""
    return [photograph.encoded.name] if photograph.encoded.name in damaged else []


def _begin(
    reader: Reader, keys: list[Key], pool: ThreadPoolExecutor, parts: int, on_processor: int
) -> list["Future[_Part]"]:
    """Has a batch read in parts, in order; each decodes its part of the ``on_processor`` photographs."""
    parts = max(1, min(parts, len(keys)))
    bounds = [len(keys) * place // parts for place in range(parts + 1)]
    shares = [on_processor * place // parts for place in range(parts + 1)]
    return [
        pool.submit(_read, reader, keys[bounds[place] : bounds[place + 1]], shares[place + 1] - shares[place])
        for place in range(parts)
    ]


def _read(reader: Reader, keys: list[Key], on_processor: int) -> _Part:
    begin = time.perf_counter()
    photographs = [reader.read(key) for key in keys]
    middle = time.perf_counter()
    decoded = 0
    for place, (read, label, names) in enumerate(photographs[:on_processor]):
        pixels = decode_or_none(read.encoded)
        if pixels is not None:
            pinned = pixels.pin_memory()
            photographs[place] = (read._replace(pixels=pinned), label, names)
            decoded += 1
    return _Part(photographs, middle - begin, time.perf_counter() - middle, decoded)
