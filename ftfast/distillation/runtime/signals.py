"""Ctrl-C, SIGTERM and SIGUSR1 as a request that a training meets between two steps.

Schedulers send SIGTERM when time is over, and where they are asked to (Slurm's ``--signal=USR1@120``) SIGUSR1 before.
One wish may come as several signals: Slurm signals every process of a job, and torchrun passes on what it gets itself.
"""

import ctypes
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from types import FrameType, TracebackType
from typing import Any, Self

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
REPEAT_SECONDS = 2.0
_PR_SET_PDEATHSIG = 1
_heard_at = -math.inf
# What was raised may be lost, in a destructor or a callback of a library's; the next training then meets it.
_raised: list[int] = []


class Stopped(Exception):
    """A training that was asked to stop, between two steps."""


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
    if _is_repeated():
        return
    _raised.append(number)
    raise Interrupted(number)


def _is_repeated() -> bool:
    """Whether this signal comes so soon after another one that both are one wish."""
    global _heard_at
    now = time.monotonic()
    if now - _heard_at < REPEAT_SECONDS:
        return True
    _heard_at = now
    return False


def _forget() -> None:
    global _heard_at
    _heard_at = -math.inf


@contextmanager
def signals_interrupt() -> Iterator[None]:
    """Inside, each of :data:`SIGNALS` raises :class:`Interrupted`; only in the main thread, which takes signals.

    SIGTERM comes as well where torchrun has started this process and is gone. After an interruption the repetitions of
    its signal are ignored for a moment, in which the process ends.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _forget()
    before: dict[signal.Signals, Any] = {number: signal.signal(number, interrupt) for number in SIGNALS}
    try:
        _end_with_launcher()
        yield
    except Interrupted:
        before = {number: partial(_unless_repeated, handler) for number, handler in before.items()}
        raise
    finally:
        _raised.clear()
        for number, handler in before.items():
            signal.signal(number, handler)


def _unless_repeated(before: Any, number: int, _frame: FrameType | None) -> None:
    if not _is_repeated():
        signal.signal(number, before)
        signal.raise_signal(number)


def _end_with_launcher() -> None:
    """On Linux: a torchrun that is gone passes nothing on, and its processes would train on and hold the run folder."""
    if "TORCHELASTIC_RUN_ID" not in os.environ or sys.platform != "linux":
        return
    launcher = os.getppid()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM), 0, 0, 0)
    if os.getppid() != launcher:  # it went meanwhile
        signal.raise_signal(signal.SIGTERM)


class StopRequest:
    """Inside, the first signal is kept and the next one interrupts at once; called, says whether one came.

    A next one within :data:`REPEAT_SECONDS` is the same wish, and changes nothing. In another thread than the main one,
    where Python takes no signals, nothing is ever asked.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if _raised:
            raise Interrupted(_raised[-1])
        _forget()
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
        if _is_repeated():
            return
        if self.number is not None:
            raise Interrupted(number)
        self.number = number
