"""The teacher's phase: trained, read back, or taken from a checkpoint that has to be of the same model; then frozen."""

import math
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ftfast.distillation.data import class_names
from ftfast.distillation.data.augment import Mixing
from ftfast.distillation.data.photographs import listing
from ftfast.distillation.models import checkpoint_names, libraries
from ftfast.distillation.models.frozen_teacher import FrozenTeacher
from ftfast.distillation.models.registry import Teacher, resized
from ftfast.distillation.models.training_graph import training_forward
from ftfast.distillation.phases.setup import Setup, build, with_batch_norms
from ftfast.distillation.runtime import checkpoint, hub
from ftfast.distillation.runtime.checkpoint import Checkpoint
from ftfast.distillation.settings.run_settings import Settings, schedule_of
from ftfast.distillation.training.evaluate import evaluate
from ftfast.distillation.training.loop import Training
from ftfast.distillation.training.methods import METHODS, any_needs
from ftfast.distillation.training.step.step import Precision
from ftfast.errors import CheckpointError, shown


def teacher_description(settings: Settings) -> dict[str, Any]:
    """What the settings say the teacher is, as its checkpoint keeps it."""
    return {"name": settings.teacher, "channels": settings.teacher_channels, "shortcut": settings.shortcut}


def read_teacher(settings: Settings) -> dict[str, Tensor]:
    """The tensors of a teacher that is not trained here, checked against the one that the settings describe.

    They are those that ``settings.teacher_checkpoint`` names, or its library's.

    Raises:
        CheckpointError: not readable, not plain tensors, of another model, or trained on other classes.
        HubError: not to be had from the Hub.
        SettingsError: a library's weights that cannot be had, or are for other classes.
    """
    dataset = settings.dataset()
    if settings.teacher_checkpoint is None:
        return libraries.pretrained_tensors(
            settings.teacher, in_channels=dataset.image_shape[0], classes=dataset.classes
        )
    path = hub.local(settings.teacher_checkpoint)
    tensors, description = checkpoint.load_tensors(path)
    expected = teacher_description(settings)
    title = f"a {settings.teacher} with {settings.teacher_channels} channels and {settings.shortcut} shortcuts"
    found = description.get("model", expected)
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} does not say what its model is: its settings.json was changed.")
    if found != expected:
        name, channels, shortcut = (shown(str(found.get(key))) for key in ("name", "channels", "shortcut"))
        raise CheckpointError(
            f"{path} is a checkpoint of another model than {title}: a {name} with {channels} channels and {shortcut} "
            "shortcuts; give --teacher, --teacher-channels and --shortcut to match."
        )
    if dataset.is_streamed and (described := checkpoint.describe_weights(path)):
        class_names.check_same(path, described, listing.named(settings.data_dir, settings.loader))
    model = build(expected, dataset, seed=0, device=torch.device("cpu"))
    tensors = checkpoint_names.to_own_layout(tensors, model, path, settings.data)
    checkpoint.fill(model, tensors, path, title)
    return tensors


def prepare_teacher(setup: Setup) -> tuple[torch.nn.Module, Checkpoint, str]:
    """The teacher, trained or read back or taken from ``teacher_checkpoint``: frozen, its checkpoint, and how it is."""
    settings, path = setup.settings, setup.folder.teacher
    setup.progress.begin("teacher", settings.teacher_epochs * len(setup.train))
    source = settings.teacher_source()
    origin: dict[str, Any] = {"seed": settings.seed} if source is None else {"source": source}
    description = setup.describe("teacher", teacher_description(settings), **origin)
    start = time.perf_counter()

    def build_teacher() -> torch.nn.Module:
        return build(description["model"], settings.dataset(), seed=settings.seed, device=setup.precision.device)

    def make() -> None:
        model = build_teacher()
        if source is None:
            _train_teacher(setup, with_batch_norms(model, settings), description)
            return
        model.load_state_dict(setup.processes.on_first(lambda: read_teacher(settings)))
        accuracy = evaluate(model, setup.test, setup.precision, setup.processes).accuracy
        setup.keep(path, Checkpoint(model.state_dict(), {"history": []}, {**description, "accuracy": accuracy}))

    finished = setup.finished(path, description, make)
    model = build_teacher()
    checkpoint.fill(model, finished.tensors, path, settings.teacher)
    setup.progress.end()
    accuracy, seconds = finished.description["accuracy"], time.perf_counter() - start
    setup.progress.say(f"teacher: {settings.teacher}, {accuracy:.2f} % of the test images, {seconds:.1f} s")
    frozen, how = _freeze(setup, model)
    return frozen, finished, how


def _freeze(setup: Setup, model: torch.nn.Module) -> tuple[torch.nn.Module, str]:
    """The teacher as students need it, and what was done to it; whole and in float32 where none of them does."""
    settings = setup.settings
    if not any(METHODS[method].needs for method in settings.methods):
        settings = replace(settings, engine="plain")
    return freeze(
        settings,
        setup.precision,
        model,
        lambda: next(setup.train.in_order(setup.part_size))[0],
        size=settings.map_size(),
        logits=any_needs(settings.methods, "logits"),
    )


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
        limit=math.inf if settings.is_noise else None,  # a teacher of noise has weights of any kind
    )
    return resized(frozen, features, size), frozen.explain()


def _train_teacher(setup: Setup, model: torch.nn.Module, description: dict[str, Any]) -> None:
    settings = setup.settings
    trainable = torch.nn.ModuleDict({"model": model})
    forward = training_forward(model, settings.teacher_features().layer, compiled=False, fused=settings.is_fused)
    mixing = Mixing(settings.dataset().classes, settings.label_smoothing, settings.mixup, settings.cutmix)
    training = Training(
        trainable,
        lambda images, labels: {"labels": torch.nn.functional.cross_entropy(forward(images).logits.float(), labels)},
        setup.train,
        schedule_of(settings, settings.teacher_epochs),
        setup.precision,
        seed=settings.seed,
        evaluation=lambda stop: evaluate(model, setup.test, setup.precision, setup.processes, stop),
        processes=setup.processes,
        mixing=mixing if mixing else None,
        replayed=settings.graph == "on",
    )
    setup.train_to_end(training, setup.folder.teacher, description)
