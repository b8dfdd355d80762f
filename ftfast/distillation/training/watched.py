"""Trainings that are seen while they go and kept: bars and lines, telemetry and trackers, and checkpoints."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ftfast.distillation.monitor.gpu_meter import gpu_of, why_there_is_none
from ftfast.distillation.monitor.progress import Progress
from ftfast.distillation.monitor.telemetry import SECONDS_BETWEEN_LINES, RunLog
from ftfast.distillation.monitor.trackers import Trackers
from ftfast.distillation.runtime.checkpoint import Checkpoint, save
from ftfast.distillation.runtime.processes import ALONE, Processes
from ftfast.distillation.training import resumable
from ftfast.distillation.training.loop import Training
from ftfast.distillation.training.step.step import Precision


@dataclass(frozen=True, kw_only=True)
class Watched:
    """Where the trainings of a folder are seen and kept, in each of the processes that train together.

    Attributes:
        root: the folder, below which each has a path of its own.
        checkpoint_seconds, checkpoints_kept: as :func:`resumable.train_to_end` takes them.
        telemetry_seconds: the time between two lines.
        counts: whoever counts something puts it here by name, in any process and at any time; lines of telemetry have
            the sums over the processes.
    """

    root: Path
    precision: Precision
    progress: Progress
    trackers: Trackers
    checkpoint_seconds: float
    checkpoints_kept: int = 3
    telemetry_seconds: float = SECONDS_BETWEEN_LINES
    processes: Processes = ALONE
    counts: dict[str, float] = field(default_factory=dict)

    def read_finished(self, path: Path, description: dict[str, Any]) -> Checkpoint | None:
        """The checkpoint of a training that has ended, read by the first process; None where it has not.

        Raises:
            CheckpointError: not as it was written, or of something else.
        """
        return self.processes.on_first(lambda: resumable.read_finished(path, description))

    def finished(self, path: Path, description: dict[str, Any], make: Callable[[], None]) -> Checkpoint:
        """The same; where it is not there, ``make`` is called, which leaves it at ``path``."""
        if (found := self.read_finished(path, description)) is None:
            make()
            found = self.read_finished(path, description)
            assert found is not None
        return found

    def keep(self, path: Path, checkpoint: Checkpoint) -> None:
        """Writes a checkpoint folder, in the first process."""
        self.processes.on_first(lambda: save(path, checkpoint))

    def forget(self, path: Path) -> None:
        """Removes a checkpoint folder that has served, in the first process."""
        if self.processes.is_first:
            shutil.rmtree(path, ignore_errors=True)

    def train_to_end(self, training: Training, path: Path, description: dict[str, Any]) -> None:
        """Trains to the end, with progress, logs and checkpoints, and leaves the checkpoint at ``path``.

        Raises:
            Exception: as :func:`resumable.train_to_end`, which has the other arguments too.
        """
        title, device, progress = str(path.relative_to(self.root)), self.precision.device, self.progress
        gpu = gpu_of(device)
        if gpu is None and (reason := why_there_is_none(device)):
            progress.say_once(f"warning: {reason}")
        training.say = lambda reason: progress.say_once(f"warning: {reason}")
        with self.trackers.training(title, description) as tracked:
            training.log = RunLog(
                self.root if self.processes.is_first else None,
                title,
                device,
                gpu,
                self.telemetry_seconds,
                processes=self.processes,
                say=progress.say_once,
                advance=progress.advance,
                add_step=tracked.add_step,
                counts=self.counts,
            )

            def after_epoch(training: Training) -> None:
                record = training.history[-1]
                progress.end_epoch(title, training.epochs, record)
                tracked.add_epoch(record, training.total_steps_done())

            resumable.train_to_end(
                training,
                path,
                description,
                checkpoint_seconds=self.checkpoint_seconds,
                after_epoch=after_epoch,
                resumed=lambda _: progress.skip(training.images_done()),
                processes=self.processes,
                say=progress.say,
                paused=training.log.pause,
                kept=self.checkpoints_kept,
            )
