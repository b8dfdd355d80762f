"""What is timed: candidates, and the groups in which they are compared."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from bench.harness.gate import Errors, Gate

FORWARD = "forward"
BACKWARD = "backward"
FORWARD_BACKWARD = "forward+backward"


def nothing() -> None:
    """The preparation of a step that needs none."""


@dataclass(frozen=True)
class Candidate:
    """One thing to time.

    Attributes:
        name: as tables show it.
        work: what a step does, ``"forward"``, ``"backward"`` of a forward in ``prepare``, or ``"forward+backward"``.
        step: on the clock.
        prepare: before every step, off the clock.
        least_bytes: the fewest bytes of memory traffic that the step's result needs; GB/s are counted from these.
        gate: judges the candidate, or None where nothing is computed that could be wrong.
        details: further fields of its record row.
    """

    name: str
    work: str
    step: Callable[[], object]
    prepare: Callable[[], object] = nothing
    least_bytes: int | None = None
    gate: Callable[[], Gate | Errors] | None = None
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Group:
    """Candidates that are compared with each other in one table; built when their turn comes, for memory's sake."""

    bench: str
    name: str
    details: Mapping[str, Any]
    build: Callable[[], list[Candidate]]
