"""The training loop of teachers and students, which can be stopped after any step and go on as if it had not been."""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ftfast.distill.data import Split, draw_batches, steps_per_epoch
from ftfast.distill.methods import Terms
from ftfast.distill.schedule import Schedule
from ftfast.distill.student_step import DivergedError, LearningStep, LossRecord, Precision

__all__ = ["DivergedError", "Epoch", "Precision", "Schedule", "Stopped", "Training", "evaluate", "logits_of"]
EVALUATION_BATCH_SIZE = 1000


class Stopped(Exception):
    """A training that was asked to stop, between two steps."""


@dataclass(frozen=True)
class Epoch:
    """One epoch's record: mean of each loss term, accuracy on the images watched in percent, and training seconds."""

    epoch: int
    losses: dict[str, float]
    accuracy: float | None
    images: int
    seconds: float


class Training:
    """One model's training, which can be stopped after any step and go on from :meth:`state` as if it had not been.

    Args:
        learner: everything that learns, student and translator alike, under one optimiser; what is averaged and
            watched is its ``model``.
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
        self._split = split
        self._schedule = schedule
        self._seed = seed
        self._accuracy = accuracy
        self._step = LearningStep(learner, terms, schedule, precision)
        self._average = None if schedule.ema is None else _average(learner, schedule.ema)
        self._steps_per_epoch = steps_per_epoch(split, schedule.batch_size)
        self._steps_done = 0  # of the epoch that is under way
        self._seconds = 0.0
        self._losses = LossRecord()

    def run(
        self,
        after_epoch: Callable[["Training"], None] | None = None,
        stop: Callable[[], bool] = lambda: False,
    ) -> list[Epoch]:
        """Trains the epochs that are left; returns the records of all.

        Args:
            after_epoch: called with this training after each.
            stop: asked after every step whether to end there.

        Raises:
            DivergedError: the loss is not finite.
            Stopped: ``stop`` said so; :meth:`state` goes on from there.
        """
        while len(self.history) < self._schedule.epochs:
            self.history.append(self._run_epoch(len(self.history), stop))
            if after_epoch is not None:
                after_epoch(self)
        if self._average is not None:
            _copy(self._average.module, self._model())
        self.learner.eval()
        return self.history

    def _run_epoch(self, epoch: int, stop: Callable[[], bool]) -> Epoch:
        self.learner.train()
        start = time.perf_counter()
        first = epoch * self._steps_per_epoch
        batches = draw_batches(
            self._split, self._schedule.batch_size, seed=self._seed, epoch=epoch, first_step=self._steps_done
        )
        for images, labels in batches:
            step = first + self._steps_done
            terms = self._step(images, labels, self._schedule.rate(step, self._steps_per_epoch))
            self._losses.add(terms, len(labels), step)
            if self._average is not None:
                self._average.update_parameters(self._model())
            self._steps_done += 1
            if stop():
                self._losses.look(step)
                self._seconds += time.perf_counter() - start
                raise Stopped
        self._losses.look(first + self._steps_per_epoch - 1)
        losses = self._losses.means(len(self._split))
        seconds = self._seconds + time.perf_counter() - start
        self._steps_done, self._seconds, self._losses = 0, 0.0, LossRecord()
        with self._averaged_weights():
            accuracy = self._accuracy() if self._accuracy is not None else None
        return Epoch(epoch + 1, losses, accuracy, len(self._split), seconds)

    def _model(self) -> nn.Module:
        return self.learner.get_submodule("model")

    @contextmanager
    def _averaged_weights(self) -> Iterator[None]:
        if self._average is None:
            yield
            return
        own = {name: tensor.clone() for name, tensor in self._model().state_dict().items()}
        _copy(self._average.module, self._model())
        try:
            yield
        finally:
            self._model().load_state_dict(own)

    def state(self) -> dict[str, Any]:
        """Tensors and plain values from which :meth:`load_state` goes on."""
        under_way = {"steps": self._steps_done, "seconds": self._seconds, "sums": dict(self._losses.sums)}
        return {
            "learner": self.learner.state_dict(),
            **self._step.state(),
            "history": [vars(record) for record in self.history],
            "epoch_under_way": under_way,
            **({} if self._average is None else {"average": self._average.state_dict()}),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Goes on from where :meth:`state` was taken, in this process or another."""
        self.learner.load_state_dict(state["learner"])
        self._step.load_state(state)
        self.history = [Epoch(**record) for record in state["history"]]
        under_way = state["epoch_under_way"]
        self._steps_done, self._seconds = under_way["steps"], under_way["seconds"]
        self._losses = LossRecord(under_way["sums"])
        if self._average is not None:
            self._average.load_state_dict(state["average"])

    def steps_done(self) -> int:
        """Steps of the epoch that is under way; 0 between two epochs."""
        return self._steps_done


def _average(learner: nn.Module, decay: float) -> AveragedModel:
    model = learner.get_submodule("model")
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)


def _copy(source: nn.Module, target: nn.Module) -> None:
    target.load_state_dict(source.state_dict())


def images_per_second(history: Iterable[Epoch]) -> float | None:
    """Training throughput, the first epoch left out as warm-up; None where there is no other."""
    measured = list(history)[1:]
    seconds = sum(record.seconds for record in measured)
    return sum(record.images for record in measured) / seconds if seconds else None


@torch.no_grad()
def logits_of(model: nn.Module, split: Split, precision: Precision) -> Tensor:
    """``[N, classes]`` float32, in the order of the split; the model's mode is left as it was."""
    was_training = model.training
    model.eval()
    with precision.autocast():
        logits = [model(images) for images, _ in split.in_order(EVALUATION_BATCH_SIZE)]
    model.train(was_training)
    return torch.cat(logits).float()


def evaluate(model: nn.Module, split: Split, precision: Precision) -> tuple[float, float]:
    """Accuracy in percent and mean cross-entropy of a classifier."""
    logits = logits_of(model, split, precision)
    accuracy = (logits.argmax(1) == split.labels).float().mean()
    return 100 * float(accuracy), float(nn.functional.cross_entropy(logits, split.labels))
