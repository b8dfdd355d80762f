"""Ctrl-C, SIGTERM and SIGUSR1 as a request that a training meets between two steps.

Schedulers send SIGTERM when time is over, and where they are asked to (Slurm's ``--signal=USR1@120``) SIGUSR1 before.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any, Self

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
# What was raised may be lost, in a destructor or a callback of a library's; the next training then meets it.
_raised: list[int] = []


class Interrupted(KeyboardInterrupt):
    """An interruption by a signal.

    It is a class of its own because Python ends itself by SIGINT, whatever status was asked for, once an exception
    that is KeyboardInterrupt itself has left a text it compiled, as dataclasses do while modules are imported.

    Args:
        number: of the signal.
        advice: how to go on.
    """

    def __init__(self, number: int, advice: str = "") -> None:
        super().__init__(advice)
        self.number = signal.Signals(number)
        self.advice = advice

    @property
    def status(self) -> int:
        """The exit status by which shells and schedulers know the signal: 130, 143 or 138."""
        return 128 + self.number


def interrupt(number: int, _frame: FrameType | None) -> None:
    """A handler of signals."""
    _raised.append(number)
    raise Interrupted(number)


@contextmanager
def signals_interrupt() -> Iterator[None]:
    """Inside, each of :data:`SIGNALS` raises :class:`Interrupted`; only in the main thread, which takes signals."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, interrupt) for number in SIGNALS}
    try:
        yield
    finally:
        _raised.clear()
        for number, handler in before.items():
            signal.signal(number, handler)


class StopRequest:
    """Inside, the first signal is kept and the next one interrupts at once; called, says whether one came.

    In another thread than the main one, where Python takes no signals, nothing is ever asked.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if _raised:
            raise Interrupted(_raised[-1])
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._keep) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self.number is not None and kind is None:  # it came after the last step
            raise Interrupted(self.number)

    def __call__(self) -> bool:
        return self.number is not None

    def _keep(self, number: int, _frame: FrameType | None) -> None:
        if self.number is not None:
            raise Interrupted(number)
        self.number = number
