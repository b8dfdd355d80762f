"""A thread that makes the next batches while a step runs."""

import queue
import threading
from collections.abc import Iterator
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

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
