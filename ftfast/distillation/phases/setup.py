"""What every phase of a run works with, and how a phase trains."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ftfast.distillation.data import datasets
from ftfast.distillation.data.datasets import Dataset
from ftfast.distillation.data.images import Images
from ftfast.distillation.data.photographs import listing
from ftfast.distillation.data.photographs.decoding import IMAGENET, Colours, to_photographs
from ftfast.distillation.data.source import Source
from ftfast.distillation.models import registry
from ftfast.distillation.phases.run_folder import RunFolder
from ftfast.distillation.settings.run_settings import DTYPES, Settings
from ftfast.distillation.training.step.step import Precision
from ftfast.distillation.training.watched import Watched


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
    settings: Settings, source: Source | None = None, *, report: Callable[[str], None] = lambda _: None
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


@dataclass(frozen=True, kw_only=True)
class Setup(Watched):
    """What every phase works with, in each of the run's processes; settings are resolved, images on the device."""

    settings: Settings
    train: Images
    students: Images
    test: Images

    @property
    def folder(self) -> RunFolder:
        """Where each result lies."""
        return RunFolder(self.root)

    @property
    def part_size(self) -> int:
        """Images in this process's part of a batch."""
        return -(-self.settings.batch_size // self.processes.part.ranks)

    def describe(self, kind: str, model: dict[str, Any], **rest: Any) -> dict[str, Any]:
        settings, dataset = self.settings, self.settings.dataset()
        of_images: dict[str, Any] = {"data": settings.data}
        if dataset.is_streamed:
            colours = to_photographs(Colours(settings.mean, settings.deviation))
            of_images["photographs"] = {"classes": dataset.classes, "size": dataset.image_shape[1], **colours}
            of_images |= listing.named(settings.data_dir, settings.loader)
        return {"kind": kind, "model": model, **of_images, "dtype": settings.dtype, **rest}


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
