"""Whether the machine is quiet enough to measure on."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

BUSY_SHARE = 0.25  # of the cores, as a load average before the start
OTHERS_SHARE = 0.05  # of the cores' time, while measuring


def usable_cores() -> int:
    """The cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def pinned(threads: int) -> Iterator[list[int] | None]:
    """Keep the process on as many cores as it has threads, the first that it may use; yields them, or None.

    On a machine of many cores the scheduler then moves no thread to another cache or memory node. It may still swap
    threads between those cores: bound one by one, a thread would wait for whatever else runs on its core. Where the
    threads take all cores nothing changes, and the system may have no such call.
    """
    allowed = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_setaffinity") else []
    if not allowed:
        yield None
        return
    kept = allowed[: max(1, threads)]
    _keep_on(kept)
    try:
        yield kept
    finally:
        _keep_on(allowed)


def _keep_on(cores: list[int]) -> None:
    # Threads that are there already keep to where they are unless told one by one.
    for thread in [int(entry.name) for entry in Path("/proc/self/task").glob("*")] or [0]:
        with suppress(OSError):  # A thread that has ended meanwhile.
            os.sched_setaffinity(thread, cores)


def load_average() -> list[float] | None:
    """Over 1, 5 and 15 minutes, or None where the system keeps none."""
    try:
        return [round(load, 2) for load in os.getloadavg()]
    except (AttributeError, OSError):
        return None


def busy_note() -> str:
    """Why figures measured now are not to be trusted, or nothing."""
    load = load_average()
    if load is None or load[0] <= BUSY_SHARE * usable_cores():
        return ""
    return (
        f"the machine was busy before the start: load average {load[0]} over one minute on {usable_cores()} cores; "
        "measure again when it is quiet"
    )


class Others:
    """The processor time that other processes take from now on; on a virtual machine, other guests too.

    A load average taken before the start says nothing of what comes later, and cannot be told from our own threads.
    """

    def __init__(self) -> None:
        self._begin = time.monotonic(), _busy_seconds(), _own_seconds()

    def cores(self) -> float | None:
        """How many cores they kept busy on average, or None where the system does not say."""
        begin, busy, own = self._begin
        now_busy = _busy_seconds()
        if busy is None or now_busy is None:
            return None
        others = (now_busy - busy) - (_own_seconds() - own)
        return round(max(0.0, others / max(time.monotonic() - begin, 1e-9)), 3)

    def note(self) -> str:
        """Why the figures measured meanwhile are not to be trusted, or nothing."""
        cores = self.cores()
        if cores is None or cores <= OTHERS_SHARE * (os.cpu_count() or 1):
            return ""
        return f"other processes kept {cores:.2f} of {os.cpu_count()} cores busy during the run; measure again"


def _busy_seconds() -> float | None:
    """All cores' time that was not idle: user, nice, system, irq, softirq and steal of Linux's /proc/stat."""
    try:
        fields = Path("/proc/stat").read_text().partition("\n")[0].split()[1:]
    except OSError:
        return None
    ticks = [int(field) for field in fields]
    return (sum(ticks[0:3]) + sum(ticks[5:8])) / os.sysconf("SC_CLK_TCK")


def _own_seconds() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system
