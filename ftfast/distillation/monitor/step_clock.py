"""Where a step's time goes: one step in many is timed part by part.

On a GPU that step's parts wait for one another, so the split is of the parts alone.
"""

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

PARTS = ("data", "teacher", "student", "head", "backward", "optimiser")
# On a GPU a sampled step waits and is not replayed, which takes several times as long.
STEPS_BETWEEN_SAMPLES = {"cpu": 50, "cuda": 500}
_OFF = nullcontext()
_timed: "StepClock | None" = None  # that of the step under way, where it is sampled


def timed(name: str) -> AbstractContextManager[Any]:
    """Around one of :data:`PARTS` of a step; nothing happens in steps that are not sampled."""
    return _OFF if _timed is None else _timed.timed(name)


def is_timed() -> bool:
    """Whether the step under way is sampled, whose parts wait for the GPU."""
    return _timed is not None


class StepClock:
    """Mean milliseconds of a step's parts over the steps sampled."""

    def __init__(self, device: torch.device, every: int | None = None) -> None:
        self._device = device
        self._every = every or STEPS_BETWEEN_SAMPLES[device.type]
        self._steps = 0
        self._sampled = 0
        self._seconds: dict[str, float] = {}

    def begin_step(self) -> None:
        """Before a step's data are asked for; the first step, which allocates and compiles, is none of the sampled."""
        global _timed
        _timed = self if self._steps % self._every == 1 % self._every else None
        self._sampled += _timed is not None
        self._steps += 1

    def end_step(self) -> None:
        """After the optimiser's step."""
        global _timed
        _timed = None

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Times what is inside."""
        start = self._now()
        try:
            yield
        finally:
            self._seconds[name] = self._seconds.get(name, 0.0) + self._now() - start

    def means(self) -> dict[str, float]:
        """Milliseconds by part, means since the last :meth:`clear`; empty where no step was sampled."""
        seconds, count = self._seconds, self._sampled
        return {name: 1e3 * seconds[name] / count for name in PARTS if name in seconds} if count else {}

    def clear(self) -> None:
        """Forgets what was timed."""
        self._seconds, self._sampled = {}, 0

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()
