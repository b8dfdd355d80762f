"""What the processes of a run tell each other of the steps since the last line of telemetry, and what it comes to."""

import math
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from ftfast.distillation.monitor.epochs import means_of

# Of these each process has its own time; backward is where all wait for the slowest.
BEFORE_GRADIENTS_MEET = ("data", "teacher", "student", "head")


@dataclass(frozen=True)
class RankMetrics:
    """One process's figures; the first one's decide when the next line comes.

    Attributes:
        is_due: whether a line is written now.
        next_steps: after how many steps all tell each other again.
        losses: sums over images, this process's share of them.
        milliseconds: by part of a sampled step.
        gpu: ``joules`` spent while training since the log began, ``watts``, ``busy_percent``, ``memory_bytes``; what is
            not known is left out.
        counts: of the caller.
    """

    is_due: bool
    next_steps: int
    losses: dict[str, float] = field(default_factory=dict)
    milliseconds: dict[str, float] = field(default_factory=dict)
    gpu: dict[str, float] = field(default_factory=dict)
    counts: dict[str, float] = field(default_factory=dict)


def summed(parts: list[dict[str, float]]) -> dict[str, float]:
    """The sums by name; a name that some have not counts as 0 there."""
    return {name: sum(one.get(name, 0) for one in parts) for name in dict.fromkeys(n for one in parts for n in one)}


def losses_of(of_all_ranks: list[RankMetrics], images: int) -> tuple[float | None, dict[str, float]]:
    """The loss and its terms, means over the images; what is not finite, which JSON does not have, is left out."""
    means = means_of(summed([told.losses for told in of_all_ranks]), images)
    finite = {name: value for name, value in means.items() if math.isfinite(value)}
    return (sum(finite.values()) if means and len(finite) == len(means) else None), finite


def gpus_of(
    of_all_ranks: list[RankMetrics], joules_before: float | None, images: int
) -> tuple[dict[str, float], float | None]:
    """The GPUs together, what one of them does not tell left out; and the joules of all until now.

    Load is their mean, and of many the lowest too; memory is that of the fullest; power and energy are summed.
    """

    def known(name: str) -> list[float]:
        values = [told.gpu[name] for told in of_all_ranks if name in told.gpu]
        return values if len(values) == len(of_all_ranks) else []

    found: dict[str, float] = {}
    if busy := known("busy_percent"):
        found["busy_percent"] = fmean(busy)
        if len(busy) > 1:
            found["lowest_busy_percent"] = min(busy)
    if watts := known("watts"):
        found["watts"] = sum(watts)
    if memory := known("memory_bytes"):
        found["memory_bytes"] = max(memory)
    joules = sum(known("joules")) if known("joules") else None
    if joules is not None and joules_before is not None:
        found["joules_per_image"] = (joules - joules_before) / images
    return found, joules


def slowest_of(of_all_ranks: list[RankMetrics]) -> dict[str, Any] | None:
    """The process that the others wait for, by its time until the gradients meet; None of one, or unsampled."""
    times = [
        sum(told.milliseconds.get(name, 0.0) for name in BEFORE_GRADIENTS_MEET)
        for told in of_all_ranks
        if told.milliseconds
    ]
    if len(times) < len(of_all_ranks) or len(times) == 1:
        return None
    longest = max(times)
    return {"rank": times.index(longest), "milliseconds": longest, "mean_milliseconds": fmean(times)}
