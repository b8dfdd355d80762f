"""What every phase of a run works with, and how a phase trains."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ftfast.distillation.data import datasets
from ftfast.distillation.data.datasets import Dataset
from ftfast.distillation.data.images import Images
from ftfast.distillation.data.photographs import listing
from ftfast.distillation.data.photographs.decoding import IMAGENET, Colours, to_photographs
from ftfast.distillation.models import registry
from ftfast.distillation.monitor.progress import Progress
from ftfast.distillation.monitor.telemetry import SECONDS_BETWEEN_LINES
from ftfast.distillation.monitor.trackers import Trackers
from ftfast.distillation.phases.run_folder import RunFolder
from ftfast.distillation.runtime.checkpoint import Checkpoint, save
from ftfast.distillation.runtime.processes import Processes
from ftfast.distillation.settings.run_settings import DTYPES, Settings
from ftfast.distillation.training import resumable
from ftfast.distillation.training.loop import Training
from ftfast.distillation.training.step.step import Precision
from ftfast.distillation.training.watched import train_watched


def with_batch_norms(model: nn.Module, settings: Settings) -> nn.Module:
    """The model, its batch norms over all processes where the settings want that."""
    return nn.SyncBatchNorm.convert_sync_batchnorm(model) if settings.sync_batch_norm else model


@contextmanager
def algorithms(threads: int, *, repeatable: bool = True) -> Iterator[None]:
    """A number of threads and, on a GPU, algorithms that give the same sums each time, or the fastest."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.backends.cudnn.flags(enabled=True, benchmark=not repeatable, deterministic=repeatable):
            yield
    finally:
        torch.set_num_threads(before)


def precision_of(settings: Settings) -> Precision:
    """The precision that resolved settings name."""
    return Precision(torch.device(settings.device), DTYPES[settings.dtype])


def load_images(
    settings: Settings, source: datasets.Source | None = None, *, report: Callable[[str], None] = lambda _: None
) -> tuple[Images, Images]:
    """The images to train on and to test on, of resolved settings.

    Args:
        source: in place of the settings' own.
        report: takes a line on what is wrong with the files.

    Raises:
        DataError: files that are not there, or damaged.
    """
    device, source = torch.device(settings.device), source or settings.image_source()
    if not settings.dataset().is_streamed:
        return datasets.load(settings.data, device, source)
    from ftfast.distillation.data.photographs import streamed

    return streamed.load(
        source.folder,
        settings.loader,
        device,
        image_size=settings.image_size,
        workers=settings.workers,
        rand_augment=settings.rand_augment,
        classes=settings.classes,
        train_images=settings.train_images,
        test_images=settings.test_images,
        report=report,
        colours=Colours(settings.mean, settings.deviation) if settings.mean else IMAGENET,
    )


@dataclass(frozen=True)
class Setup:
    """What every phase works with, in each of the run's processes; settings are resolved, images on the device.

    Attributes:
        counts: whoever counts something puts it here by name, in any process and at any time; lines of telemetry have
            the sums over the processes.
    """

    settings: Settings
    precision: Precision
    folder: RunFolder
    progress: Progress
    checkpoint_seconds: float
    train: Images
    students: Images
    test: Images
    processes: Processes
    trackers: Trackers
    checkpoints_kept: int = 3
    telemetry_seconds: float = SECONDS_BETWEEN_LINES
    counts: dict[str, float] = field(default_factory=dict)

    @property
    def part_size(self) -> int:
        """Images in this process's part of a batch."""
        return -(-self.settings.batch_size // self.processes.part.ranks)

    def read_finished(self, path: Path, description: dict[str, Any]) -> Checkpoint | None:
        """The checkpoint of a phase that has ended, read by the first process; None where it has not.

        Raises:
            CheckpointError: not as it was written, or of something else.
        """
        return self.processes.on_first(lambda: resumable.read_finished(path, description))

    def keep(self, path: Path, checkpoint: Checkpoint) -> None:
        """Writes a checkpoint folder, in the first process."""
        self.processes.on_first(lambda: save(path, checkpoint))

    def forget(self, path: Path) -> None:
        """Removes a checkpoint folder that has served, in the first process."""
        if self.processes.is_first:
            shutil.rmtree(path, ignore_errors=True)

    def describe(self, kind: str, model: dict[str, Any], **rest: Any) -> dict[str, Any]:
        settings, dataset = self.settings, self.settings.dataset()
        of_images: dict[str, Any] = {"data": settings.data}
        if dataset.is_streamed:
            colours = to_photographs(Colours(settings.mean, settings.deviation))
            of_images["photographs"] = {"classes": dataset.classes, "size": dataset.image_shape[1], **colours}
            of_images |= listing.named(settings.data_dir, settings.loader)
        return {"kind": kind, "model": model, **of_images, "dtype": settings.dtype, **rest}

    def train_to_end(self, training: Training, path: Path, description: dict[str, Any]) -> None:
        """Trains to the end, with progress, logs and checkpoints, and leaves the checkpoint at ``path``."""
        train_watched(
            training,
            path,
            description,
            root=self.folder.path,
            device=self.precision.device,
            progress=self.progress,
            trackers=self.trackers,
            checkpoint_seconds=self.checkpoint_seconds,
            kept=self.checkpoints_kept,
            telemetry_seconds=self.telemetry_seconds,
            processes=self.processes,
            counts=self.counts,
        )


def build(
    description: dict[str, Any], dataset: Dataset, *, seed: int, device: torch.device, pretrained: bool = False
) -> nn.Module:
    """The described model for the images of a data set, channels_last on the device."""
    model = registry.build_model(
        **description,
        in_channels=dataset.image_shape[0],
        classes=dataset.classes,
        seed=seed,
        pretrained=pretrained,
    )
    return registry.place(model, device)
