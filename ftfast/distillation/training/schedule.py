"""How long and how fast to train."""

import math
from dataclasses import dataclass, fields
from typing import Any, NamedTuple, Self


class Customary(NamedTuple):
    """What an optimiser of students is given where nobody says otherwise; see :class:`Schedule`."""

    learning_rate: float
    weight_decay: float
    decay_vectors: bool


CUSTOMARY = {"sgd": Customary(0.05, 5e-4, True), "adamw": Customary(1e-3, 0.05, False)}
"""The optimisers of students."""


@dataclass(frozen=True)
class Schedule:
    """The length of a training and its descent.

    Attributes:
        epochs, batch_size, momentum, weight_decay, nesterov: as SGD and its loop take them.
        learning_rate: the first one.
        kind: ``"cosine"`` falls to 0 step by step; ``"steps"`` is multiplied by ``gamma`` at the start of each of the
            ``milestones``, epochs counted from 0.
        decay_vectors: False spares biases and norms, which are vectors, from the weight decay.
        clip_gradient: the largest L2 norm of all gradients together; None leaves them.
        accumulate: parts in which a batch goes through the networks, for memory's sake; one step for all of them.
        ema: decay of the average of the weights over steps, which is what is kept in the end; None keeps the last.
        optimiser: ``"sgd"``; ``"adam"`` in its customary form; or ``"adamw"``, whose first beta is the momentum.
        warm_up: epochs over which the rate rises in equal steps to the first one; the cosine falls over the rest.
    """

    epochs: int
    batch_size: int
    learning_rate: float
    momentum: float
    weight_decay: float
    nesterov: bool = True
    kind: str = "cosine"
    milestones: tuple[int, ...] = ()
    gamma: float = 0.1
    decay_vectors: bool = True
    clip_gradient: float | None = None
    accumulate: int = 1
    ema: float | None = None
    optimiser: str = "sgd"
    warm_up: float = 0.0

    @classmethod
    def like(cls, record: Any, **others: Any) -> Self:
        """With a record's values of the same names, but for ``others``."""
        named = {item.name: getattr(record, item.name) for item in fields(cls) if hasattr(record, item.name)}
        return cls(**named | others)

    def rate(self, step: int, steps_per_epoch: int) -> float:
        """The learning rate of a step, counted from 0 over all epochs."""
        rising = min(round(self.warm_up * steps_per_epoch), self.epochs * steps_per_epoch)
        if step < rising:
            return self.learning_rate * (step + 1) / (rising + 1)
        if self.kind == "cosine":
            return cosine(self.learning_rate, step - rising, self.epochs * steps_per_epoch - rising)
        passed = sum(step >= milestone * steps_per_epoch for milestone in self.milestones)
        return self.learning_rate * self.gamma**passed

    @property
    def warning(self) -> str | None:
        """The sentence to show where the rate never falls, though it was meant to."""
        if self.kind == "cosine" or not self.milestones or min(self.milestones) < self.epochs:
            return None
        return (
            f"the learning rate never falls, since every milestone ({', '.join(map(str, self.milestones))}) lies past "
            f"the {self.epochs} epochs: give --milestones that lie before them."
        )


def cosine(peak: float, step: int, steps: int) -> float:
    """``peak`` at step 0, falling to 0 at ``steps``."""
    return peak * 0.5 * (1 + math.cos(math.pi * step / steps))
