"""A training that is seen while it goes: bars and lines, telemetry and trackers, and checkpoints."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ftfast.distillation.monitor.gpu_meter import gpu_of, why_there_is_none
from ftfast.distillation.monitor.progress import Progress
from ftfast.distillation.monitor.telemetry import SECONDS_BETWEEN_LINES, RunLog
from ftfast.distillation.monitor.trackers import Trackers
from ftfast.distillation.runtime.processes import ALONE, Processes
from ftfast.distillation.training import resumable
from ftfast.distillation.training.loop import Training


def train_watched(
    training: Training,
    path: Path,
    description: dict[str, Any],
    *,
    root: Path,
    device: torch.device,
    progress: Progress,
    trackers: Trackers,
    checkpoint_seconds: float,
    kept: int = 3,
    telemetry_seconds: float = SECONDS_BETWEEN_LINES,
    processes: Processes = ALONE,
    counts: Mapping[str, float] | None = None,
) -> None:
    """Trains to the end, with progress, logs and checkpoints, and leaves the checkpoint at ``path`` below ``root``.

    Raises:
        Exception: as :func:`resumable.train_to_end`, which has the other arguments too.
    """
    title = str(path.relative_to(root))
    gpu = gpu_of(device)
    if gpu is None and (reason := why_there_is_none(device)):
        progress.say_once(f"warning: {reason}")
    training.say = lambda reason: progress.say_once(f"warning: {reason}")
    with trackers.training(title, description) as tracked:
        training.log = RunLog(
            root if processes.is_first else None,
            title,
            device,
            gpu,
            telemetry_seconds,
            processes=processes,
            say=progress.say_once,
            advance=progress.advance,
            add_step=tracked.add_step,
            counts=counts,
        )

        def after_epoch(training: Training) -> None:
            record = training.history[-1]
            progress.end_epoch(title, training.epochs, record)
            tracked.add_epoch(record, training.total_steps_done())

        resumable.train_to_end(
            training,
            path,
            description,
            checkpoint_seconds=checkpoint_seconds,
            after_epoch=after_epoch,
            resumed=lambda _: progress.skip(training.images_done()),
            processes=processes,
            say=progress.say,
            paused=training.log.pause,
            kept=kept,
        )
