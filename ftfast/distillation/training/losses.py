"""The loss terms of an epoch: their means, and the end of a training whose loss is no longer finite."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ftfast.distillation.monitor.epochs import LEFT_OUT, means_of
from ftfast.distillation.runtime.processes import ALONE, Processes
from ftfast.distillation.training.methods import Terms
from ftfast.errors import IN_A_NEW_RUN, DistillError

# Losses are looked at this often: on a GPU each look waits for all steps before it.
STEPS_BETWEEN_CHECKS = 50
# Steps in a row: the scaler halves its factor at each, and has come to 1 long before.
MOST_LEFT_OUT = 50


class DivergedError(DistillError):
    """A training whose loss is no longer finite."""


class LossRecord:
    """Means of loss terms over an epoch: kept where they are, and looked at, which waits, every so many steps.

    Args:
        sums: over the images drawn so far by all processes.
        leaves_out: the scaler of float16 leaves steps out whose loss is not finite, and so do the means; without it,
            such a loss ends the training.
        checked: called after each look at whether losses are finite.
    """

    def __init__(
        self,
        sums: dict[str, Tensor] | None = None,
        processes: Processes = ALONE,
        *,
        leaves_out: bool = False,
        checked: Callable[[], None] = lambda: None,
    ) -> None:
        self._processes = processes
        self._leaves_out = leaves_out
        self._checked = checked
        self._left_out_in_a_row = 0
        # Every process adds its own; what was drawn so far is the first one's.
        self.sums = {name: float(value) if processes.is_first else 0.0 for name, value in (sums or {}).items()}
        self._taken = dict(self.sums)
        self._names: tuple[str, ...] = ()
        self._rows: Tensor | None = None  # of the steps since the last look, a column a term
        self._shares: list[float] = []  # the images of each, by process
        self._unchecked: list[float] = []

    def take(self) -> dict[str, Tensor]:
        """What this process's sums have grown by since the last call; the device is waited for."""
        self._look()
        grown = {name: torch.tensor(total - self._taken.get(name, 0.0)) for name, total in self.sums.items()}
        self._taken = dict(self.sums)
        return grown

    def add(self, terms: Terms, images: int, step: int) -> None:
        """Takes a step's terms, of a batch of that many images; ``step`` is counted from 0 over all epochs.

        Raises:
            DivergedError: one of the last steps had a loss that is not finite, or, where these are left out, so many
                in a row.
        """
        values, names = list(terms.values()), tuple(terms)
        if self._rows is None or names != self._names:
            self._look()
            self._names = names
            self._rows = torch.stack(values).expand(STEPS_BETWEEN_CHECKS, -1).clone()
        torch.stack(values, out=self._rows[len(self._shares)])
        self._shares.append(images / self._processes.part.ranks)
        if len(self._shares) + len(self._unchecked) >= STEPS_BETWEEN_CHECKS:
            self.check_finite(step)

    def _look(self) -> None:
        """Adds what is on the device, step by step, so that the sums are the same whenever it is looked at."""
        if self._rows is None or not self._shares:
            return
        for row, share in zip(self._rows[: len(self._shares)].tolist(), self._shares, strict=True):
            loss = sum(row)
            self._unchecked.append(loss)
            if self._leaves_out:
                left_out = not math.isfinite(loss)
                self._sum(LEFT_OUT, left_out * share)
                row = [0.0] * len(row) if left_out else row
            for name, value in zip(self._names, row, strict=True):
                self._sum(name, value * share)
        self._shares = []

    def _sum(self, name: str, value: float) -> None:
        self.sums[name] = self.sums.get(name, 0.0) + value

    def check_finite(self, step: int) -> None:
        """Waits for the device and checks every loss since the last check, ``step`` being the latest."""
        self._look()
        if not self._unchecked:
            return
        ranks = self._processes.part.ranks
        losses = (self._processes.sum(torch.tensor(self._unchecked, dtype=torch.float64)) / ranks).tolist()
        self._unchecked = []
        for place, loss in enumerate(losses):
            self._left_out_in_a_row = 0 if math.isfinite(loss) else self._left_out_in_a_row + 1
            if self._left_out_in_a_row > (MOST_LEFT_OUT if self._leaves_out else 0):
                raise _diverged(loss, step - len(losses) + 1 + place)
        self._checked()

    def totals(self) -> dict[str, Tensor]:
        """The sums over all processes, float64; every one of them asks at the same step."""
        self._look()
        return {
            name: self._processes.sum(torch.tensor(total, dtype=torch.float64)) for name, total in self.sums.items()
        }

    def means(self, images: int) -> dict[str, float]:
        """The terms by name, each a mean over the images, but those of steps that were left out.

        Raises:
            DivergedError: every step was.
        """
        means = means_of({name: float(total) for name, total in self.totals().items()}, images)
        if not means:
            raise _diverged(math.nan, 0)
        return means


def _diverged(loss: float, step: int) -> DivergedError:
    return DivergedError(
        f"the loss is {loss} at step {step + 1}; the last checkpoint before it is kept. Lower --learning-rate or the "
        f"weights of the loss, or set --clip-gradient, {IN_A_NEW_RUN} once that is there."
    )
