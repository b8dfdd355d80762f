"""What every phase of a run works with, and how a phase trains."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ftfast.distill import data, resumable
from ftfast.distill.engine import Epoch, Precision, Training
from ftfast.distill.folder import RunFolder
from ftfast.distill.progress import Progress
from ftfast.distill.settings import DTYPES, Settings
from ftfast.distill.tensorboard import EpochLog


def precision_of(settings: Settings) -> Precision:
    """The precision that resolved settings name."""
    return Precision(torch.device(settings.device), DTYPES[settings.dtype])


@dataclass(frozen=True)
class Setup:
    """What every phase works with; settings are resolved, images are on the device."""

    settings: Settings
    precision: Precision
    folder: RunFolder
    progress: Progress
    checkpoint_seconds: float
    train: data.Split
    students: data.Split
    test: data.Split

    def describe(self, kind: str, model: dict[str, Any], **rest: Any) -> dict[str, Any]:
        return {"kind": kind, "model": model, "data": self.settings.data, "dtype": self.settings.dtype, **rest}

    def finish(self, training: Training, path: Path, description: dict[str, Any]) -> None:
        """Trains to the end, with progress, logs and checkpoints, and leaves the checkpoint at ``path``."""
        with EpochLog(self.folder.tensorboard / path.relative_to(self.folder.path)) as log:

            def after_epoch(record: Epoch) -> None:
                self.progress.advance(record.images)
                log.add(record)

            resumable.finish(
                training,
                path,
                description,
                checkpoint_seconds=self.checkpoint_seconds,
                after_epoch=after_epoch,
                resumed=lambda history: self.progress.skip(sum(record.images for record in history)),
            )
