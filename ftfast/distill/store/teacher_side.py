"""The frozen teacher and paraphraser from which a store is made, out of a run folder or the store itself."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ftfast.distill.models.registry import Outputs
from ftfast.distill.phases.paraphraser import build_paraphraser
from ftfast.distill.phases.run_folder import RunFolder
from ftfast.distill.phases.setup import build
from ftfast.distill.phases.teacher import freeze, teacher_description
from ftfast.distill.phases.trainable import TeacherSide
from ftfast.distill.runtime import checkpoint
from ftfast.distill.runtime.checkpoint import Checkpoint
from ftfast.distill.settings.presets import settings_of
from ftfast.distill.settings.run_settings import Settings
from ftfast.distill.store.header import Header
from ftfast.distill.training.step import Precision
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
    settings: Settings,
    precision: Precision,
    teacher: Checkpoint,
    paraphraser: Checkpoint,
    example: Callable[[], Tensor],
    *,
    size: tuple[int, int],
    logits: bool,
) -> TeacherSide:
    """Both as they compute factors; for the arguments see :func:`ftfast.distill.phases.teacher.freeze`."""
    model = build(teacher_description(settings), settings.dataset(), seed=0, device=precision.device)
    checkpoint.fill(model, teacher.tensors, Path("the teacher"), settings.teacher)
    frozen, _ = freeze(settings, precision, model, example, size=size, logits=logits)
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
