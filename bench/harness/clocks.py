"""Clocks: how long a candidate's steps take on a device."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Protocol

import torch

from bench.harness import power
from bench.harness.gate import Candidate, nothing
from bench.harness.power import Energy
from ftfast.distillation.monitor import gpu_meter


class Clock(Protocol):
    """Times calls of a candidate's step."""

    def time(self, candidate: Candidate, calls: int) -> list[float]:
        """Milliseconds of each of ``calls`` steps."""

    def energy(self, candidate: Candidate, call_seconds: float, seconds: float) -> Energy | None:
        """What steps of about ``call_seconds`` take when run back to back for ``seconds``, None where unknown."""

    def peak_bytes(self, candidate: Candidate) -> int | None:
        """The most memory that one step holds above what is there before it, None where unknown."""


class CpuClock:
    """Wall-clock time on the CPU."""

    def time(self, candidate: Candidate, calls: int) -> list[float]:
        prepare, step, now = candidate.prepare, candidate.step, time.perf_counter_ns
        elapsed = []
        for _ in range(calls):
            prepare()
            begin = now()
            step()
            elapsed.append((now() - begin) * 1e-6)
        return elapsed

    def energy(self, candidate: Candidate, call_seconds: float, seconds: float) -> Energy | None:
        return None

    def peak_bytes(self, candidate: Candidate) -> int | None:
        return None


class CudaClock:
    """Device time between two events, with the L2 cache overwritten before every step."""

    def __init__(self, device: torch.device) -> None:
        cache_bytes = torch.cuda.get_device_properties(device).L2_cache_size
        self._flush = torch.empty(2 * cache_bytes, dtype=torch.uint8, device=device)
        self._device = device
        self._gpu = gpu_meter.gpu_of(device)

    def time(self, candidate: Candidate, calls: int) -> list[float]:
        events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(calls)]
        for begin, end in events:
            candidate.prepare()
            self._flush.zero_()
            begin.record()
            candidate.step()
            end.record()
        torch.cuda.synchronize()
        return [begin.elapsed_time(end) for begin, end in events]

    def energy(self, candidate: Candidate, call_seconds: float, seconds: float) -> Energy | None:
        """Caches are as the steps leave them: a flush would take more energy than a small step."""

        def step() -> None:
            candidate.prepare()
            candidate.step()

        def synchronise() -> None:
            torch.cuda.synchronize(self._device)

        return power.measure_energy(self._gpu, step, synchronise, call_seconds=call_seconds, seconds=seconds)

    def peak_bytes(self, candidate: Candidate) -> int | None:
        candidate.prepare()
        torch.cuda.synchronize(self._device)
        torch.cuda.reset_peak_memory_stats(self._device)
        before = torch.cuda.memory_allocated(self._device)
        candidate.step()
        torch.cuda.synchronize(self._device)
        return torch.cuda.max_memory_allocated(self._device) - before


def clock_for(device: torch.device) -> Clock:
    """The clock of a device."""
    return CudaClock(device) if device.type == "cuda" else CpuClock()


def graph_replay(candidate: Candidate, fill: Callable[[], object] = nothing) -> Candidate:
    """The candidate with its step captured in a CUDA graph, at the first call: no launches from Python are left.

    Args:
        fill: before every replay and on the clock, brings what the step reads to where it reads it.
    """
    captured: list[torch.cuda.CUDAGraph] = []

    def step() -> None:
        if not captured:
            captured.append(_capture(candidate))
        fill()
        captured[0].replay()

    return replace(candidate, name=f"{candidate.name}, CUDA graph", prepare=nothing, step=step)


def _capture(candidate: Candidate) -> torch.cuda.CUDAGraph:
    for _ in range(3):
        candidate.prepare()
        candidate.step()
    candidate.prepare()
    graph = torch.cuda.CUDAGraph()
    # Other threads may call CUDA meanwhile: a meter, say.
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream(), capture_error_mode="thread_local"):
        candidate.step()
    return graph


@contextmanager
def own_stream(device: torch.device) -> Iterator[None]:
    """On a GPU, work in a stream that a graph can be captured on.

    Backward nodes of a factor remember the stream that they were made on, and a capture on another waits for it, which
    it must not: so all is made on one.
    """
    if device.type != "cuda":
        yield
        return
    with torch.cuda.stream(torch.cuda.Stream(device)):
        yield
