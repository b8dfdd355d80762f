"""The training loop of teachers and students, which can be stopped after any step and go on as if it had not been."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ftfast.distillation.data.images import Batches
from ftfast.distillation.monitor.epochs import Epoch
from ftfast.distillation.monitor.processor_time import EpochClock
from ftfast.distillation.monitor.step_clock import timed
from ftfast.distillation.monitor.telemetry import RunLog
from ftfast.distillation.runtime.processes import ALONE, Processes
from ftfast.distillation.runtime.seeds import seed_generators, seed_of
from ftfast.distillation.runtime.signals import Stopped
from ftfast.distillation.training.evaluate import Accuracies
from ftfast.distillation.training.losses import LossRecord
from ftfast.distillation.training.methods import Terms
from ftfast.distillation.training.schedule import Schedule
from ftfast.distillation.training.step.average import Average
from ftfast.distillation.training.step.step import LearningStep, Precision, RunningStatistics


class Training:
    """One model's training, which can be stopped after any step and go on from :meth:`state` as if it had not been.

    Args:
        trainable: everything that learns, student and translator alike, under one optimiser; what is averaged and
            watched is its ``model``.
        terms: a batch, its images ``[N, C, H, W]`` and labels ``[N]`` first, to the named terms of the loss, which are
            summed.
        images: to learn from.
        schedule, precision: see there.
        seed: decides the order of the images, and with epoch and step all else that is drawn.
        evaluation: called after every epoch for the accuracies in its record, with what it has to ask on the way as
            :func:`evaluate` does.
        processes: those that train together, each on its part of every batch; all of them make the same calls.
        mixing: changes a batch's images and labels before the terms see them.
        replayed, frozen: on a GPU the step is replayed as a CUDA graph; see :class:`LearningStep`.
    """

    def __init__(
        self,
        trainable: nn.Module,
        terms: Callable[..., Terms],
        images: Batches,
        schedule: Schedule,
        precision: Precision,
        *,
        seed: int,
        evaluation: Callable[[Callable[[], bool]], Accuracies] | None = None,
        processes: Processes = ALONE,
        mixing: Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]] | None = None,
        replayed: bool = False,
        frozen: Iterable[nn.Module] = (),
    ) -> None:
        self.trainable = trainable
        self.history: list[Epoch] = []
        self.log: RunLog | None = None
        self.say: Callable[[str], None] = lambda _: None  # takes the reason why the step is not replayed
        self.is_between_steps = True  # what learns is of one step, whatever happens now
        self._images = images
        self._schedule = schedule
        self._seed = seed
        self._evaluation = evaluation
        self._processes = processes
        self._mixing = mixing
        self._average = None if schedule.ema is None else Average(self._model(), schedule.ema)
        self._step = LearningStep(
            trainable,
            terms,
            schedule,
            precision,
            processes,
            average=self._average,
            replayed=replayed,
            frozen=frozen,
            say=lambda reason: self.say(reason),
        )
        self._steps_per_epoch = images.steps(schedule.batch_size)
        self._steps_done = 0  # of the epoch that is under way
        self._drawn = 0  # images in these
        self._clock = EpochClock(processes)
        self._damaged = 0  # files of that epoch before a load_state
        self._statistics = None
        if precision.dtype == torch.float16:
            self._statistics = RunningStatistics([trainable] if self._average is None else [trainable, self._average])
        self._losses = self._loss_record()

    def run(
        self,
        after_epoch: Callable[["Training"], None] | None = None,
        stop: Callable[[], bool] = lambda: False,
        after_step: Callable[["Training"], None] | None = None,
        stop_evaluating: Callable[[], bool] = lambda: False,
    ) -> list[Epoch]:
        """Trains the epochs that are left; returns the records of all.

        Args:
            after_epoch: called with this training after each.
            stop: asked after every step whether to end there.
            after_step: called with this training after each step, before ``stop`` is asked.
            stop_evaluating: asked before every batch on which the accuracy is found whether to end there.

        Raises:
            DivergedError: the loss is not finite.
            Stopped: ``stop`` or ``stop_evaluating`` said so; :meth:`state` goes on from there.
        """
        with self._step.on_stream():
            while len(self.history) < self._schedule.epochs:
                self.history.append(self._run_epoch(len(self.history), stop, after_step, stop_evaluating))
                if after_epoch is not None:
                    after_epoch(self)
        self._step.forget()
        if self._average is not None:
            _copy(self._average.module, self._model())
        self.trainable.eval()
        return self.history

    def _run_epoch(
        self,
        epoch: int,
        stop: Callable[[], bool],
        after_step: Callable[["Training"], None] | None,
        stop_evaluating: Callable[[], bool],
    ) -> Epoch:
        self.trainable.train()
        self._clock.start()
        if self.log is not None:
            self.log.begin_epoch()
        batch_size = self._schedule.batch_size
        first = epoch * self._steps_per_epoch
        batches = self._images.draw(
            batch_size, seed=self._seed, epoch=epoch, first_step=self._steps_done, part=self._processes.part
        )
        for batch in self._timed(batches):
            self.is_between_steps = False
            step = first + self._steps_done
            whole = self._images.step_size(batch_size, self._steps_done) or len(batch[0])
            seed = seed_of(self._seed, step, self._processes.part.rank)
            seed_generators(seed, batch[0].device)  # of dropout and the like
            if self._mixing is not None:
                batch = (*self._mixing(batch[0], batch[1], seed), *batch[2:])
            terms = self._step(batch, self._schedule.rate(step, self._steps_per_epoch), whole)
            self._losses.add(terms, whole, step)
            self._steps_done += 1
            self._drawn += whole
            self.is_between_steps = True
            if self.log is not None:
                self.log.clock.end_step()
                self.log.step(self, whole)
            if after_step is not None:
                after_step(self)
            if stop():
                self._losses.check_finite(step)
                self._clock.stop()
                raise Stopped
        self._losses.check_finite(first + self._steps_done - 1)
        if self.log is not None:
            self.log.end_epoch(self)
        self._clock.stop()
        damaged = self._damaged_so_far()
        self._images.check_damage_limit(damaged)
        judged = self._watch(stop_evaluating)
        accuracy, top5 = (None, None) if judged is None else (judged.accuracy, judged.top5_accuracy)
        means = self._losses.means(self._drawn)
        seconds, others_share = self._clock.read()
        record = Epoch(epoch + 1, means, accuracy, self._drawn, seconds, top5, damaged, others_share)
        # Not before: a training that is stopped while it is judged goes on with the epoch's judgement.
        self._steps_done, self._drawn, self._damaged = 0, 0, 0
        self._clock = EpochClock(self._processes)
        self._losses = self._loss_record()
        return record

    def _watch(self, stop: Callable[[], bool]) -> Accuracies | None:
        if self._evaluation is None:
            return None
        with self._averaged_weights():
            return self._evaluation(stop)

    def _damaged_so_far(self) -> int:
        """Files of the epoch under way that could not be decoded, in any of the processes; all of them ask."""
        if not self._steps_done:
            return 0
        return self._damaged + int(self._processes.sum(torch.tensor(self._images.damaged())))

    def _timed(self, batches: Iterator[tuple[Tensor, ...]]) -> Iterator[tuple[Tensor, ...]]:
        """The batches, each asked for within a step of the log's clock."""
        while True:
            if self.log is not None:
                self.log.clock.begin_step()
            with timed("data"):
                batch = next(batches, None)
            if batch is None:
                if self.log is not None:
                    self.log.clock.end_step()
                return
            yield batch

    def _loss_record(self, sums: dict[str, Tensor] | None = None) -> LossRecord:
        if self._statistics is None:
            return LossRecord(sums, self._processes)
        return LossRecord(sums, self._processes, leaves_out=True, checked=self._statistics.restore_finite)

    def _model(self) -> nn.Module:
        return self.trainable.get_submodule("model")

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
        """Tensors and plain values from which :meth:`load_state` goes on; of many processes, all ask at one step.

        Raises:
            DivergedError: a loss is not finite, so the tensors are not worth keeping.
        """
        self._losses.check_finite(self.total_steps_done() - 1)
        seconds, others_share = self._clock.read()
        under_way = {"steps": self._steps_done, "seconds": seconds, "sums": self._losses.totals()}
        under_way |= {"damaged": self._damaged_so_far(), "images": self._drawn, "others_share": others_share}
        return {
            "trainable": self.trainable.state_dict(),
            **self._step.state(),
            "history": [vars(record) for record in self.history],
            "epoch_under_way": under_way,
            **({} if self._average is None else {"average": self._average.state_dict()}),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Goes on from where :meth:`state` was taken, in this process or another."""
        self.trainable.load_state_dict(state["trainable"])
        self._step.load_state(state)
        self.history = [Epoch(**record) for record in state["history"]]
        under_way = state["epoch_under_way"]
        self._steps_done = under_way["steps"]
        # Checkpoints of before that was measured do not have it.
        self._clock = EpochClock(self._processes, under_way["seconds"], under_way.get("others_share"))
        self._damaged = under_way.get("damaged", 0)
        sizes = (self._images.step_size(self._schedule.batch_size, step) for step in range(self._steps_done))
        self._drawn = under_way["images"] if "images" in under_way else sum(size or 0 for size in sizes)
        self._losses = self._loss_record(under_way["sums"])
        if self._average is not None:
            self._average.load_state_dict(state["average"])

    @property
    def epochs(self) -> int:
        """How many there are to be."""
        return self._schedule.epochs

    def images_done(self) -> int:
        """Images drawn in all epochs."""
        return sum(record.images for record in self.history) + self._drawn

    def take_losses(self) -> dict[str, Tensor]:
        """What the sums of the loss terms, this process's share of them, have grown by since the last call."""
        return self._losses.take()

    def figures(self) -> dict[str, float]:
        """The last step's ``learning_rate`` and, in float16, ``loss_scale``."""
        return self._step.figures()

    def steps_done(self) -> int:
        """Steps of the epoch that is under way; 0 between two epochs."""
        return self._steps_done

    def total_steps_done(self) -> int:
        """Steps of all epochs."""
        return len(self.history) * self._steps_per_epoch + self._steps_done


def _copy(source: nn.Module, target: nn.Module) -> None:
    target.load_state_dict(source.state_dict())
