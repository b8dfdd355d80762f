"""Whose work the processor did meanwhile: ours, or that of other processes, beside which a rate says little of ours.

On a virtual machine other guests count too. A load average taken before says nothing of what comes later, and cannot be
told from our own threads.
"""

import multiprocessing
import os
import socket
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple, Self

from ftfast.distillation.runtime.processes import ALONE, Processes

NOTABLE_SHARE = 0.05  # of the cores' time; where others took more, a rate is none to quote


def usable_cores() -> int:
    """The cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class ProcessorTime(NamedTuple):
    """Seconds that the cores of a machine which this process may use were busy, and those of this process's own work.

    ``busy`` is None where the system does not say; ``at`` is the moment, and of a difference the time between two.
    """

    machine: str
    cores: int
    at: float
    busy: float | None
    own: float

    @classmethod
    def now(cls) -> Self:
        return cls(socket.gethostname(), usable_cores(), time.monotonic(), _busy_seconds(), _own_seconds())

    def since(self, begin: "ProcessorTime") -> "ProcessorTime":
        """What was spent from ``begin`` on."""
        busy = None
        if self.busy is not None and begin.busy is not None and self.cores == begin.cores:
            busy = self.busy - begin.busy
        return self._replace(at=self.at - begin.at, busy=busy, own=self.own - begin.own)


def others_share(spent: Iterable[ProcessorTime]) -> float | None:
    """The share of the cores' time that went to other processes, on the machine where it was largest.

    Args:
        spent: differences, of all of our processes.

    Returns:
        About 0 to 1, a little below 0 where nothing but us ran, since clocks tick; None where the system does not say.
    """
    of_machine: dict[str, list[ProcessorTime]] = {}
    for each in spent:
        of_machine.setdefault(each.machine, []).append(each)
    shares = []
    for ours in of_machine.values():
        widest = max(ours, key=lambda each: each.cores)
        if widest.busy is None:
            return None
        shares.append((widest.busy - sum(each.own for each in ours)) / (widest.cores * max(widest.at, 1e-9)))
    return max(shares, default=None)


def _busy_seconds() -> float | None:
    """The usable cores' time that was not idle: user, nice, system, irq, softirq and steal of Linux's /proc/stat."""
    try:
        lines = [line.split() for line in Path("/proc/stat").read_text().splitlines() if line.startswith("cpu")]
    except OSError:
        return None
    of_core = {name: [int(field) for field in fields] for name, *fields in lines}
    usable = [f"cpu{core}" for core in os.sched_getaffinity(0)]
    counted = usable if all(name in of_core for name in usable) else ["cpu"]  # some containers count from 0
    ticks = (sum(of_core[name][0:3]) + sum(of_core[name][5:8]) for name in counted)
    return sum(ticks) / os.sysconf("SC_CLK_TCK")


def _own_seconds() -> float:
    """Of this process, the children that have ended, and those of multiprocessing that run, such as a loader's."""
    times = os.times()
    ticks = 0
    for child in multiprocessing.active_children():
        with suppress(OSError):  # it has just ended
            fields = Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()
            ticks += sum(int(field) for field in fields[11:15])
    own = times.user + times.system + times.children_user + times.children_system
    return own + (ticks / os.sysconf("SC_CLK_TCK") if ticks else 0.0)


class EpochClock:
    """An epoch's training time, and other processes' share of the cores meanwhile; it can be stopped and go on.

    Args:
        processes: those of the run, which all ask at the same steps.
        seconds, share: of the epoch so far, where it goes on from a checkpoint.
    """

    def __init__(self, processes: Processes = ALONE, seconds: float = 0.0, share: float | None = 0.0) -> None:
        self._processes = processes
        self._seconds, self._share = seconds, share
        self._begin: ProcessorTime | None = None

    def start(self) -> None:
        """The training goes on."""
        self._begin = ProcessorTime.now()

    def stop(self) -> None:
        """It stands still, while the model is judged."""
        self._seconds, self._share = self.read()
        self._begin = None

    def read(self) -> tuple[float, float | None]:
        """The seconds so far, and the share of the cores' time that others took in them, None where it is unknown."""
        if self._begin is None:
            return self._seconds, self._share
        spent = ProcessorTime.now().since(self._begin)
        share = others_share(self._processes.gather(spent))
        return together((self._seconds, self._share), (spent.at, share))


def together(*parts: tuple[float, float | None]) -> tuple[float, float | None]:
    """Seconds and shares of several stretches as those of one."""
    seconds, weighted = 0.0, 0.0
    known = True
    for length, share in parts:
        seconds += length
        known = known and (share is not None or not length)
        weighted += length * (share or 0.0)
    return seconds, weighted / seconds if known and seconds else None
