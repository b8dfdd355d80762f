"""The teacher's side of a store: the frozen networks from which it is made, and what stands for them in a training."""

from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ftfast.distillation.data.images import Images
from ftfast.distillation.data.stored_views import viewed
from ftfast.distillation.models.registry import Outputs
from ftfast.distillation.phases.paraphraser import build_paraphraser
from ftfast.distillation.phases.run_folder import RunFolder
from ftfast.distillation.phases.setup import Setup, build, load_images, precision_of
from ftfast.distillation.phases.teacher import freeze, read_teacher, teacher_description
from ftfast.distillation.phases.trainable import TeacherSide
from ftfast.distillation.runtime import checkpoint, files
from ftfast.distillation.runtime.checkpoint import Checkpoint
from ftfast.distillation.settings.presets import settings_of
from ftfast.distillation.settings.run_settings import Settings
from ftfast.distillation.store import header as headers
from ftfast.distillation.store.header import Header
from ftfast.distillation.store.read import PARAPHRASER, TEACHER, Store
from ftfast.distillation.store.stored_images import StoredImages
from ftfast.distillation.training.methods import any_needs
from ftfast.distillation.training.step.step import Precision
from ftfast.errors import DistillError, StoreError
from ftfast.modules import Paraphraser


class NoTeacher(nn.Module):
    """In the place of a teacher whose factors are stored; refuses to run."""

    def forward(self, images: Tensor) -> Outputs:
        raise DistillError("there is no teacher in this training: its factors come from a store.")


def read_run(folder: Path) -> tuple[Checkpoint, Checkpoint]:
    """The teacher and the paraphraser of a run folder, without what their trainings needed to go on.

    Raises:
        CheckpointError: one that is not as it was written.
        StoreError: one that is not there.
    """
    found = []
    for name, path in (("teacher", RunFolder(folder).teacher), ("paraphraser", RunFolder(folder).paraphraser)):
        if not path.exists():
            raise StoreError(
                f"{folder} has no trained {name}; a store takes the folder of a run of ftfast distill with a method "
                "that uses factors, such as ft."
            )
        kept = checkpoint.load(path)
        history = {"history": kept.state["history"]} if "history" in kept.state else {}
        found.append(Checkpoint(kept.tensors, history, kept.description))
    return found[0], found[1]


def frozen_teacher_side(
    settings: Settings, header: Header, train: Images, teacher: Checkpoint, paraphraser: Checkpoint
) -> TeacherSide:
    """Both as they compute a store's factors of the training images."""
    precision = precision_of(settings)
    model = build(teacher_description(settings), settings.dataset(), seed=0, device=precision.device)
    checkpoint.fill(model, teacher.tensors, Path("the teacher"), settings.teacher)
    height, width = header.factor[1:]
    frozen, _ = freeze(
        settings,
        precision,
        model,
        lambda: next(train.in_order(header.batch_size))[0],
        size=(height, width),
        logits=bool(header.classes),
    )
    return TeacherSide(frozen, filled_paraphraser(settings, paraphraser))


def filled_paraphraser(settings: Settings, kept: Checkpoint) -> Paraphraser:
    """In eval, on the settings' device."""
    paraphraser = build_paraphraser(settings)
    checkpoint.fill(paraphraser, kept.tensors, Path("the paraphraser"), "this paraphraser")
    return paraphraser.eval()


@torch.no_grad()
def factors_of(teacher_side: TeacherSide, precision: Precision, images: Tensor) -> tuple[Tensor, Tensor]:
    """Factors ``[N, C, H, W]`` in the dtype that they are computed in, and logits."""
    assert teacher_side.paraphraser is not None
    with precision.autocast():
        logits, features = teacher_side.teacher(images)
        return teacher_side.paraphraser.encode(features), logits


def settings_for(header: Header, **given: Any) -> Settings:
    """Resolved settings with a store's images, teacher and paraphraser, to compute its factors anew.

    Args:
        given: ``device``, ``data_dir``, ``workers``, ``loader``.
    """
    taken = {**header.read_settings(), **{name: value for name, value in given.items() if value is not None}}
    # No student is trained, so that what students need of the data is not asked for.
    few: dict[str, Any] = {"methods": ("none",), "student_images": 0, "batch_size": 1}
    if classes := taken["classes"]:
        few["paraphraser_held_out"] = max(2, classes)
    return settings_of(None, **taken, **few, dtype=header.computed_in).resolved()


def check(settings: Settings) -> None:
    """Raises StoreError where resolved settings cannot train from their store, naming what differs from it."""
    store = _opened(settings)
    for name in (TEACHER, PARAPHRASER):
        store.checkpoint_of(name)
    if settings.teacher_checkpoint is not None:
        headers.check_hashes(store.path, store.header, {"teacher": files.hash_tensors(read_teacher(settings))})
    with closing(load_images(settings)[0]) as train:
        headers.check_hashes(store.path, store.header, viewed(train, settings.data_dir).hashes())


def _opened(settings: Settings) -> Store:
    assert settings.store is not None
    path = Path(settings.store)
    headers.check_settings(path, headers.read(path), settings)
    store = Store(path)
    if any_needs(settings.methods, "logits") and not store.header.classes:
        raise StoreError(
            f"methods has {', '.join(settings.methods)}, and the store {path} has no logits; leave kd out, or build it "
            "with --logits."
        )
    height, width = settings.map_size()
    if any_needs(settings.methods, "factors") and store.header.factor[1:] != (height, width):
        raise StoreError(
            f"student gives maps of {height}x{width}, and the store {path} has factors of "
            f"{store.header.factor[1]}x{store.header.factor[2]}; take another --student or --student-layer."
        )
    return store


def stored_images(settings: Settings, train: Images) -> StoredImages:
    """The training images of resolved settings, which :func:`check` has let pass, with what their store holds."""
    return StoredImages.of(viewed(train, settings.data_dir), _opened(settings), torch.device(settings.device))


def stored_teacher_side(setup: Setup, store: Store) -> tuple[TeacherSide, Checkpoint, dict[str, Any] | None]:
    """The paraphraser, a teacher that is never asked, its checkpoint, and the paraphraser's diagnosis.

    Both checkpoints are copied into the run folder, which then has what every run folder has.
    """
    found = {name: setup.processes.on_first(partial(store.checkpoint_of, name)) for name in (TEACHER, PARAPHRASER)}
    for name, path in ((TEACHER, setup.folder.teacher), (PARAPHRASER, setup.folder.paraphraser)):
        if not setup.processes.on_first(path.exists):
            setup.keep(path, found[name])
    teacher, paraphraser = found[TEACHER], found[PARAPHRASER]
    header = store.header
    setup.progress.say(
        f"factor store: {header.settings['teacher']}, {teacher.description['accuracy']:.2f} % of the test images; "
        f"{header.images:,} images x {header.views} view{'s' * (header.views > 1)} in {header.dtype}"
    )
    filled = filled_paraphraser(setup.settings, paraphraser)
    return TeacherSide(NoTeacher(), filled), teacher, paraphraser.description["diagnosis"]
