"""The loss terms of an epoch: their means, and the end of a training whose loss is no longer finite."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ftfast.distill.monitor.epochs import LEFT_OUT, means_of
from ftfast.distill.runtime.processes import ALONE, Processes
from ftfast.distill.training.methods import Terms
from ftfast.errors import IN_A_NEW_RUN, DistillError

# Losses are looked at this often: on a GPU each look waits for all steps before it.
STEPS_BETWEEN_CHECKS = 50
# Steps in a row: the scaler halves its factor at each, and has come to 1 long before.
MOST_LEFT_OUT = 50


class DivergedError(DistillError):
    """A training whose loss is no longer finite."""


class LossRecord:
    """Means of loss terms over an epoch, summed on the device and looked at every so many steps.

    Args:
        sums: over the images drawn so far by all processes.
        leaves_out: the scaler of float16 leaves steps out whose loss is not finite, and so do the means; without it,
            such a loss ends the training.
        checked: called after each look.
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
        self.sums = dict(sums or {})
        if not processes.is_first:  # every process adds its own; what was drawn so far is the first one's
            self.sums = {name: torch.zeros_like(value) for name, value in self.sums.items()}
        self._taken = dict(self.sums)
        self._unseen: list[Tensor] = []

    def take(self) -> dict[str, Tensor]:
        """What this process's sums have grown by since the last call; nothing is waited for."""
        grown = {name: total - self._taken[name] if name in self._taken else total for name, total in self.sums.items()}
        self._taken = dict(self.sums)
        return grown

    def add(self, terms: Terms, images: int, step: int) -> None:
        """Takes a step's terms, of a batch of that many images; ``step`` is counted from 0 over all epochs.

        Raises:
            DivergedError: one of the last steps had a loss that is not finite, or, where these are left out, so many
                in a row.
        """
        loss = torch.stack(list(terms.values())).sum()
        share = images / self._processes.part.ranks
        if self._leaves_out:
            is_finite = loss.isfinite()
            terms = {name: value.where(is_finite, 0.0) for name, value in terms.items()} | {LEFT_OUT: ~is_finite}
        for name, value in terms.items():
            self.sums[name] = self.sums.get(name, 0) + value * share
        self._unseen.append(loss)
        if len(self._unseen) == STEPS_BETWEEN_CHECKS:
            self.check_finite(step)

    def check_finite(self, step: int) -> None:
        """Waits for the device and checks every loss since the last look, ``step`` being the latest."""
        if not self._unseen:
            return
        losses = (self._processes.sum(torch.stack(self._unseen)) / self._processes.part.ranks).tolist()
        self._unseen = []
        for place, loss in enumerate(losses):
            self._left_out_in_a_row = 0 if math.isfinite(loss) else self._left_out_in_a_row + 1
            if self._left_out_in_a_row > (MOST_LEFT_OUT if self._leaves_out else 0):
                raise _diverged(loss, step - len(losses) + 1 + place)
        self._checked()

    def totals(self) -> dict[str, Tensor]:
        """The sums over all processes; every one of them asks at the same step."""
        return {name: self._processes.sum(total) for name, total in self.sums.items()}

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
