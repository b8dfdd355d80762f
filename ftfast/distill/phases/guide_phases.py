"""The phases before the students: the teacher, then the paraphraser of its features."""

import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ftfast.distill.data.augment import Mixing
from ftfast.distill.data.images import Images
from ftfast.distill.models.frozen_teacher import FrozenTeacher
from ftfast.distill.models.registry import resized
from ftfast.distill.models.training_graph import training_forward
from ftfast.distill.phases.paraphraser import (
    DISTANCES,
    build_paraphraser,
    diagnose,
    paraphraser_images,
    read_paraphraser,
    teacher_features,
    train_paraphraser,
)
from ftfast.distill.phases.setup import Setup
from ftfast.distill.phases.teacher import Teacher, build, read_teacher, teacher_description
from ftfast.distill.phases.trainable import with_batch_norms
from ftfast.distill.runtime import checkpoint
from ftfast.distill.runtime.checkpoint import Checkpoint
from ftfast.distill.settings.run_settings import Settings, schedule_of
from ftfast.distill.training.evaluate import evaluate
from ftfast.distill.training.loop import Training
from ftfast.distill.training.methods import METHODS, Terms
from ftfast.distill.training.schedule import Schedule
from ftfast.distill.training.step import Precision
from ftfast.modules import Paraphraser


def prepare_teacher(setup: Setup) -> tuple[torch.nn.Module, Checkpoint]:
    """The frozen teacher and its checkpoint, trained or read back or taken from ``teacher_checkpoint``."""
    settings, path = setup.settings, setup.folder.teacher
    setup.progress.begin("teacher", settings.teacher_epochs * len(setup.train))
    source = settings.teacher_source()
    origin: dict[str, Any] = {"seed": settings.seed} if source is None else {"source": source}
    description = setup.describe("teacher", teacher_description(settings), **origin)
    model = build(description["model"], settings.dataset(), seed=settings.seed, device=setup.precision.device)
    start = time.perf_counter()
    finished = setup.read_finished(path, description)
    if finished is None and source is not None:
        model.load_state_dict(setup.processes.on_first(lambda: read_teacher(settings)))
        accuracy = evaluate(model, setup.test, setup.precision, setup.processes).accuracy
        kept = {**description, "accuracy": accuracy}
        setup.keep(path, Checkpoint(model.state_dict(), {"history": []}, kept))
    elif finished is None:
        model = with_batch_norms(model, settings)
        _train_teacher(setup, model, description)
        model = build(description["model"], settings.dataset(), seed=settings.seed, device=setup.precision.device)
    finished = finished or setup.read_finished(path, description)
    assert finished is not None
    checkpoint.fill(model, finished.tensors, path, settings.teacher)
    setup.progress.end()
    accuracy, seconds = finished.description["accuracy"], time.perf_counter() - start
    setup.progress.say(f"teacher: {settings.teacher}, {accuracy:.2f} % of the test images, {seconds:.1f} s")
    return _freeze(setup, model), finished


def _freeze(setup: Setup, model: torch.nn.Module) -> torch.nn.Module:
    """The teacher as students need it; whole and in float32 where none of them does."""
    settings = setup.settings
    if not any(METHODS[method].uses_teacher for method in settings.methods):
        settings = replace(settings, engine="plain")
    frozen, note = freeze(
        settings,
        setup.precision,
        model,
        lambda: next(setup.train.in_order(setup.part_size))[0],
        size=settings.map_size(),
        logits=any(METHODS[method].uses_teacher_logits for method in settings.methods),
    )
    if note:
        setup.progress.say(f"frozen teacher: {note}")
    return frozen


def freeze(
    settings: Settings,
    precision: Precision,
    model: torch.nn.Module,
    example: Callable[[], Tensor],
    *,
    size: tuple[int, int],
    logits: bool,
) -> tuple[torch.nn.Module, str]:
    """A trained teacher for inference alone, images to its ``Outputs``, and what was done to it.

    Args:
        example: gives images as they will come, on the device.
        size: height and width to which its features are pooled where they are larger.
        logits: are wanted too.
    """
    features = settings.teacher_features()
    if settings.engine == "plain":
        return resized(Teacher(model, features.layer), features, size), ""
    frozen = FrozenTeacher(
        model,
        features.layer,
        dtype=precision.dtype,
        classifier=logits,
        example=example(),
        execution="compile" if precision.device.type == "cuda" and settings.compile == "on" else "eager",
    )
    return resized(frozen, features, size), frozen.explain()


def _train_teacher(setup: Setup, model: torch.nn.Module, description: dict[str, Any]) -> None:
    settings = setup.settings
    learner = torch.nn.ModuleDict({"model": model})
    forward = training_forward(model, settings.teacher_features().layer, compiled=False, fused=settings.is_fused)
    mixing = Mixing(settings.dataset().classes, settings.label_smoothing, settings.mixup, settings.cutmix)
    training = Training(
        learner,
        lambda images, labels: {"labels": torch.nn.functional.cross_entropy(forward(images).logits.float(), labels)},
        setup.train,
        schedule_of(settings, settings.teacher_epochs),
        setup.precision,
        seed=settings.seed,
        judge=lambda stop: evaluate(model, setup.test, setup.precision, setup.processes, stop),
        processes=setup.processes,
        mixing=mixing if mixing else None,
    )
    setup.finish(training, setup.folder.teacher, description)


def prepare_paraphraser(setup: Setup, teacher: torch.nn.Module) -> tuple[Paraphraser | None, dict[str, Any] | None]:
    """The paraphraser, trained or read back or taken from ``paraphraser_checkpoint``, and its diagnosis.

    Both are None where no method uses factors.

    Raises:
        ParaphraserError: it learned nothing.
    """
    settings, path, progress = setup.settings, setup.folder.paraphraser, setup.progress
    if not any(METHODS[method].uses_factors for method in settings.methods):
        return None, None
    progress.begin("paraphraser", paraphraser_images(settings))
    start = time.perf_counter()
    paraphraser = build_paraphraser(settings)
    model = {"in_channels": paraphraser.in_channels, "factor_channels": paraphraser.factor_channels}
    source = settings.paraphraser_checkpoint
    description = setup.describe("paraphraser", model, **({} if source is None else {"source": source}))
    finished = setup.read_finished(path, description)
    if finished is None:
        held_out, fitted = setup.train.cut(settings.paraphraser_held_out)
        if source is not None:
            paraphraser.load_state_dict(setup.processes.on_first(lambda: read_paraphraser(settings)))
        elif settings.paraphraser_epochs:
            with closing(fitted):
                _train_on_the_way(setup, teacher, paraphraser, fitted, description)
        else:
            features = teacher_features(teacher, fitted, setup.precision)
            train_paraphraser(paraphraser, features, settings, setup.precision, progress.advance)
        features = teacher_features(teacher, held_out, setup.precision)
        is_noise = settings.loader == "synthetic"
        diagnosis = setup.processes.on_first(
            lambda: diagnose(paraphraser, features, setup.precision, of_noise=is_noise)
        )
        judged = {**asdict(diagnosis), "held_out_images": len(held_out), "warning": diagnosis.warning}
        setup.keep(path, Checkpoint(paraphraser.state_dict(), {}, {**description, "diagnosis": judged}))
        setup.forget(_trained_on_the_way(setup))
        finished = setup.read_finished(path, description)
        assert finished is not None
    checkpoint.fill(paraphraser, finished.tensors, path, "this paraphraser")
    progress.end()
    judged = finished.description["diagnosis"]
    progress.say(
        f"paraphraser: explains {judged['explained_variance']:.3f} of the variance of {judged['held_out_images']} "
        f"held-out images, spread {judged['spread']:.2f} of that of random factors, {time.perf_counter() - start:.1f} s"
    )
    if judged["warning"]:
        progress.say(f"warning: {judged['warning']}")
    return paraphraser, judged


def _trained_on_the_way(setup: Setup) -> Path:
    """Where a paraphraser lies that is trained and not judged yet."""
    return setup.folder.paraphraser.with_name("paraphraser.unjudged")


def _train_on_the_way(
    setup: Setup, teacher: torch.nn.Module, paraphraser: Paraphraser, images: Images, description: dict[str, Any]
) -> None:
    """Trains a paraphraser while the images pass by, as a student is trained; no feature map is kept."""
    settings = setup.settings
    distance = DISTANCES[settings.paraphraser_loss]

    def terms(batch: Tensor, labels: Tensor) -> Terms:
        features = teacher(batch).features.float()
        return {"reconstruction": distance(paraphraser(features).float(), features)}

    schedule = Schedule(
        settings.paraphraser_epochs,
        settings.paraphraser_batch_size,
        settings.paraphraser_learning_rate,
        settings.momentum,
        settings.paraphraser_weight_decay,
        nesterov=False,
        kind="cosine" if settings.paraphraser_learning_rate_schedule == "cosine" else "steps",
        optimiser=settings.paraphraser_optimiser,
    )
    learner = torch.nn.ModuleDict({"model": paraphraser})
    training = Training(
        learner, terms, images, schedule, setup.precision, seed=settings.seed, processes=setup.processes
    )
    path = _trained_on_the_way(setup)
    unjudged = {**description, "kind": "unjudged paraphraser"}
    finished = setup.read_finished(path, unjudged)
    if finished is None:
        setup.finish(training, path, unjudged)
    else:
        checkpoint.fill(paraphraser, finished.tensors, path, "this paraphraser")
    paraphraser.eval()
