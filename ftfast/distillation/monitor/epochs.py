"""What is recorded of a training's epochs."""

from collections.abc import Iterable
from dataclasses import dataclass

from ftfast.distillation.monitor.processor_time import together


@dataclass(frozen=True)
class Epoch:
    """One epoch's record: mean of each loss term, accuracies on the images watched in percent, and training seconds.

    ``damaged`` are the files that could not be decoded, and others stood in for; ``others_share`` is the part of the
    usable cores' time that other processes took in these seconds, None where the system does not say.
    """

    epoch: int
    losses: dict[str, float]
    accuracy: float | None
    images: int
    seconds: float
    top5_accuracy: float | None = None
    damaged: int = 0
    others_share: float | None = None


def images_per_second(history: Iterable[Epoch]) -> float | None:
    """Training throughput, the first epoch left out as warm-up; None where there is no other."""
    measured = list(history)[1:]
    seconds = sum(record.seconds for record in measured)
    return sum(record.images for record in measured) / seconds if seconds else None


def others_share(history: Iterable[Epoch]) -> float | None:
    """What other processes took of the cores' time in the epochs of :func:`images_per_second`; None where unknown."""
    share = together(*((record.seconds, record.others_share) for record in list(history)[1:]))[1]
    return None if share is None else max(0.0, share)


LEFT_OUT = "images left out"


def means_of(totals: dict[str, float], images: int) -> dict[str, float]:
    """Means by term of sums over images, those left out not among them; empty where none is left."""
    counted = images - totals.get(LEFT_OUT, 0.0)
    if counted < 0.5:  # of an image
        return {}
    return {name: total / counted for name, total in totals.items() if name != LEFT_OUT}
