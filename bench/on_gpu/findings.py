"""Findings as lines of JSON, each written as soon as it is known, and how steps time."""

import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bench.harness.clocks import Clock, clock_for
from bench.harness.gate import Candidate

WARMUPS = 5


class Findings:
    """Prints and appends findings; a file of lines that each stand alone survives whatever ends the step."""

    def __init__(self, path: Path) -> None:
        self._path = path
        path.write_text("")

    def add(self, **found: Any) -> None:
        """One finding."""
        line = json.dumps(found)
        print(line, flush=True)
        with self._path.open("a") as file:
            file.write(line + "\n")


def device_here() -> torch.device:
    """The first CUDA device, or the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Stopwatch:
    """Median milliseconds of a function on a device, caches cold on a GPU."""

    def __init__(self, device: torch.device, calls: int) -> None:
        self._clock: Clock = clock_for(device)
        self._calls = calls

    def median(self, step: Callable[[], object]) -> float:
        candidate = Candidate("", "", step)
        self._clock.time(candidate, min(WARMUPS, self._calls))
        return statistics.median(self._clock.time(candidate, self._calls))


def try_each(findings: Findings, cases: dict[str, Callable[[], dict[str, Any]]]) -> int:
    """Add what each case finds, or why it finds nothing; code that this checkout has not got is named as absent.

    Returns:
        How many cases raised.
    """
    raised = 0
    for name, case in cases.items():
        try:
            findings.add(case=name, **case())
        except ImportError as error:
            findings.add(case=name, absent=str(error))
        except Exception as error:  # The other cases are still to be tried.
            raised += 1
            findings.add(case=name, error=f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}")
    return raised
