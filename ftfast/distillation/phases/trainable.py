"""One student: its model, its translator where the method has one, and its training."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ftfast.distillation.data.augment import Mixing
from ftfast.distillation.data.images import Images
from ftfast.distillation.models.registry import place, resized, seeded
from ftfast.distillation.models.training_graph import training_forward
from ftfast.distillation.monitor.step_clock import timed
from ftfast.distillation.phases.setup import build, with_batch_norms
from ftfast.distillation.runtime.processes import ALONE, Processes
from ftfast.distillation.settings.run_settings import Settings, schedule_of
from ftfast.distillation.training.evaluate import evaluate
from ftfast.distillation.training.loop import Training
from ftfast.distillation.training.methods import METHODS, Pair, Stored, Taught, Terms, Weights
from ftfast.distillation.training.step import BesideStudent, Precision
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
    """What learns, the student as ``model`` and beside it what its method adds, and the terms of its loss.

    The terms take images, labels and, where a factor store stands in for the teacher, what :class:`Stored` holds.
    """
    chosen = METHODS[method]
    trainable = nn.ModuleDict({"model": student})
    between: nn.Module | None = None
    if chosen.between is not None:
        pair = Pair(
            settings.student_features().channels,
            settings.teacher_features().channels,
            teacher_side.paraphraser,
            weights,
            teacher_side.controls,
            backend="reference" if settings.engine == "plain" else "auto",
        )
        with seeded(seed):
            made = chosen.between(pair)
        between = place(made.module, torch.device(settings.device))
        trainable[made.name] = made.learns
    features = settings.student_features()
    forward = training_forward(student, features.layer, compiled=settings.compile == "on", fused=settings.is_fused)
    forward = resized(forward, features, settings.map_size())
    both = BesideStudent(teacher_side.teacher, forward)

    def terms(images: Tensor, labels: Tensor, *stored: Tensor) -> Terms:
        taught: Taught | None = None
        if chosen.needs and not stored:
            found, taught = both(images)
        else:
            with timed("student"):
                found = forward(images)
            if chosen.needs:
                taught = Stored(*stored)
        with timed("head"):
            return chosen.terms(found, taught, labels, between, weights)

    return trainable, terms
