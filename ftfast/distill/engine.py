"""The training loop of teachers and students: SGD with Nesterov momentum along a cosine, under autocast."""

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ftfast.distill.data import Split, draw_batches, steps_per_epoch
from ftfast.distill.errors import IN_A_NEW_RUN, DistillError
from ftfast.distill.methods import Terms

EVALUATION_BATCH_SIZE = 1000


class DivergedError(DistillError):
    """A training whose loss is no longer finite."""


@dataclass(frozen=True)
class Precision:
    """Where the models compute, and in which dtype; parameters stay float32."""

    device: torch.device
    dtype: torch.dtype

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)


@dataclass(frozen=True)
class Schedule:
    """How long and how fast to train; the rate falls from ``learning_rate`` to 0 along a cosine, step by step."""

    epochs: int
    batch_size: int
    learning_rate: float
    momentum: float
    weight_decay: float


@dataclass(frozen=True)
class Epoch:
    """One epoch's record: mean of each loss term, accuracy on the images watched in percent, and training seconds."""

    epoch: int
    losses: dict[str, float]
    accuracy: float | None
    images: int
    seconds: float


class Training:
    """One model's training, which can be stopped after any epoch and go on from :meth:`state` as if it had not been.

    Args:
        learner: everything that learns, student and translator alike, under one optimiser.
        terms: images ``[N, C, H, W]`` and labels ``[N]`` to the named terms of the loss, which are summed.
        split: the images to learn from.
        schedule, precision: see there.
        seed: decides the order of the images.
        accuracy: called after every epoch for its record.
    """

    def __init__(
        self,
        learner: nn.Module,
        terms: Callable[[Tensor, Tensor], Terms],
        split: Split,
        schedule: Schedule,
        precision: Precision,
        *,
        seed: int,
        accuracy: Callable[[], float] | None = None,
    ) -> None:
        self.learner = learner
        self.history: list[Epoch] = []
        self._terms = terms
        self._split = split
        self._schedule = schedule
        self._precision = precision
        self._seed = seed
        self._accuracy = accuracy
        self._optimiser = torch.optim.SGD(
            [parameter for parameter in learner.parameters() if parameter.requires_grad],
            lr=schedule.learning_rate,
            momentum=schedule.momentum,
            weight_decay=schedule.weight_decay,
            nesterov=True,
            fused=True,
        )
        self._steps_per_epoch = steps_per_epoch(split, schedule.batch_size)

    def run(self, after_epoch: Callable[["Training"], None] | None = None) -> list[Epoch]:
        """Trains the epochs that are left; returns the records of all.

        Raises:
            DivergedError: the loss is not finite.
        """
        while len(self.history) < self._schedule.epochs:
            self.history.append(self._run_epoch(len(self.history)))
            if after_epoch is not None:
                after_epoch(self)
        self.learner.eval()
        return self.history

    def _run_epoch(self, epoch: int) -> Epoch:
        self.learner.train()
        start = time.perf_counter()
        sums: dict[str, Tensor] = {}
        step = epoch * self._steps_per_epoch
        for images, labels in draw_batches(self._split, self._schedule.batch_size, seed=self._seed, epoch=epoch):
            for group in self._optimiser.param_groups:
                group["lr"] = cosine(self._schedule.learning_rate, step, self._schedule.epochs * self._steps_per_epoch)
            with self._precision.autocast():
                terms = self._terms(images, labels)
                loss = torch.stack(list(terms.values())).sum()
            self._optimiser.zero_grad(set_to_none=True)
            loss.backward()
            self._optimiser.step()
            for name, value in terms.items():  # summed on the device: a GPU is waited for once an epoch
                sums[name] = sums.get(name, 0) + value.detach() * len(labels)
            step += 1
        losses = {name: float(total) / len(self._split) for name, total in sums.items()}
        seconds = time.perf_counter() - start
        if not math.isfinite(sum(losses.values())):
            raise DivergedError(
                f"the loss is not finite after epoch {epoch + 1}; lower --learning-rate or the weights of the loss "
                f"{IN_A_NEW_RUN} once that is there."
            )
        accuracy = self._accuracy() if self._accuracy is not None else None
        return Epoch(epoch + 1, losses, accuracy, len(self._split), seconds)

    def state(self) -> dict[str, Any]:
        """Tensors and plain values from which :meth:`load_state` goes on."""
        return {
            "learner": self.learner.state_dict(),
            "optimiser": self._optimiser.state_dict(),
            "history": [vars(record) for record in self.history],
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Goes on from where :meth:`state` was taken, in this process or another."""
        self.learner.load_state_dict(state["learner"])
        self._optimiser.load_state_dict(state["optimiser"])
        self.history = [Epoch(**record) for record in state["history"]]


def cosine(peak: float, step: int, steps: int) -> float:
    """``peak`` at step 0, falling to 0 at ``steps``."""
    return peak * 0.5 * (1 + math.cos(math.pi * step / steps))


def images_per_second(history: Iterable[Epoch]) -> float | None:
    """Training throughput, the first epoch left out as warm-up; None where there is no other."""
    measured = list(history)[1:]
    seconds = sum(record.seconds for record in measured)
    return sum(record.images for record in measured) / seconds if seconds else None


@torch.no_grad()
def run_in_batches(model: nn.Module, images: Tensor, precision: Precision) -> list[Any]:
    """The outputs of a model in eval mode, one for each batch; the model's mode is left as it was."""
    was_training = model.training
    model.eval()
    with precision.autocast():
        outputs = [model(batch) for batch in images.split(EVALUATION_BATCH_SIZE)]
    model.train(was_training)
    return outputs


def evaluate(model: nn.Module, split: Split, precision: Precision) -> tuple[float, float]:
    """Accuracy in percent and mean cross-entropy of a classifier."""
    logits = torch.cat(run_in_batches(model, split.images, precision)).float()
    accuracy = (logits.argmax(1) == split.labels).float().mean()
    return 100 * float(accuracy), float(nn.functional.cross_entropy(logits, split.labels))
