"""One student: its model, its translator where the method has one, and its training."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ftfast.distillation.data.augment import Mixing
from ftfast.distillation.data.images import Images
from ftfast.distillation.models.registry import resized
from ftfast.distillation.models.training_graph import training_forward
from ftfast.distillation.phases.setup import build, with_batch_norms
from ftfast.distillation.runtime.processes import ALONE, Processes
from ftfast.distillation.settings.run_settings import Settings, schedule_of
from ftfast.distillation.training.evaluate import evaluate
from ftfast.distillation.training.loop import Training
from ftfast.distillation.training.methods import Terms
from ftfast.distillation.training.step.step import Precision
from ftfast.distillation.training.taught_student import taught_student
from ftfast.distillation.training.terms import Pair, Weights
from ftfast.modules import Paraphraser


def student_description(settings: Settings) -> dict[str, Any]:
    """What the settings say a student is, as its checkpoint keeps it."""
    return {"name": settings.student, "channels": settings.student_channels, "shortcut": settings.shortcut}


@dataclass(frozen=True)
class TeacherSide:
    """What students learn from beside the labels, all of it frozen; a teacher is called for its ``Outputs``."""

    teacher: nn.Module
    paraphraser: Paraphraser | None
    controls: dict[str, Any] = field(default_factory=dict)


def build_student(settings: Settings, seed: int) -> nn.Module:
    """A student's model; one seed gives the same weights whatever the method, so methods compare in pairs."""
    return build(
        student_description(settings),
        settings.dataset(),
        seed=seed,
        device=torch.device(settings.device),
        pretrained=settings.student_pretrained,
    )


def student_training(
    settings: Settings,
    precision: Precision,
    teacher_side: TeacherSide,
    images: Images,
    *,
    method: str,
    weights: Weights,
    seed: int,
    epochs: int | None = None,
    watched: Images | None = None,
    processes: Processes = ALONE,
) -> Training:
    """The training of one student, ready to run; its trainable has the student as ``model``.

    Args:
        images: to learn from, in an order that ``seed`` decides, the same for every method.
        epochs: in place of the settings' ``student_epochs``.
        watched: images on which the accuracy is recorded after every epoch; nothing is decided by it.
        processes: those that train it together.
    """
    student = with_batch_norms(build_student(settings, seed), settings)
    trainable, terms = trainable_of(settings, teacher_side, student, method=method, weights=weights, seed=seed)
    schedule = schedule_of(settings, epochs or settings.student_epochs)
    evaluation = None if watched is None else lambda stop: evaluate(student, watched, precision, processes, stop)
    mixing = Mixing(settings.dataset().classes, settings.label_smoothing, settings.mixup, settings.cutmix)
    return Training(
        trainable,
        terms,
        images,
        schedule,
        precision,
        seed=seed,
        evaluation=evaluation,
        processes=processes,
        mixing=mixing if mixing else None,
        replayed=settings.graph == "on",
        frozen=[it for it in (teacher_side.teacher, teacher_side.paraphraser) if it is not None],
    )


def trainable_of(
    settings: Settings, teacher_side: TeacherSide, student: nn.Module, *, method: str, weights: Weights, seed: int
) -> tuple[nn.ModuleDict, Callable[..., Terms]]:
    """What learns and the terms of its loss, as :func:`taught_student` gives them."""
    features = settings.student_features()
    forward = training_forward(student, features.layer, compiled=settings.compile == "on", fused=settings.is_fused)
    pair = Pair(
        features.channels,
        settings.teacher_features().channels,
        teacher_side.paraphraser,
        weights,
        teacher_side.controls,
        backend="reference" if settings.engine == "plain" else "auto",
    )
    return taught_student(
        student,
        resized(forward, features, settings.map_size()),
        teacher_side.teacher,
        method=method,
        pair=pair,
        device=torch.device(settings.device),
        seed=seed,
    )
