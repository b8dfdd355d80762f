"""The phase of the ablation's controls: what stands in the paraphraser's place, trained as it is, and judged."""

import time
from dataclasses import asdict
from typing import Any

import torch
from torch import nn

from ftfast.distillation.models.registry import place
from ftfast.distillation.phases.paraphraser import teacher_features, train_paraphraser
from ftfast.distillation.phases.setup import Setup
from ftfast.distillation.runtime import checkpoint
from ftfast.distillation.runtime.checkpoint import Checkpoint
from ftfast.distillation.runtime.seeds import seeded
from ftfast.distillation.settings.run_settings import Settings
from ftfast.distillation.training.controls import CONTROLS
from ftfast.distillation.training.methods import METHODS
from ftfast.distillation.training.paraphrasing.diagnosis import diagnose_paraphraser


def controls_of(settings: Settings) -> list[str]:
    """Those of :data:`CONTROLS` that the run's methods need."""
    found = (METHODS[method].control for method in settings.methods)
    return list(dict.fromkeys(name for name in found if name is not None))


def controls_images(settings: Settings) -> int:
    """How many images the controls draw that learn."""
    drawn = settings.paraphraser_steps * settings.paraphraser_batch_size
    return drawn * sum(CONTROLS[name].learns for name in controls_of(settings))


def prepare_controls(setup: Setup, teacher: nn.Module) -> tuple[dict[str, Any], dict[str, Any]]:
    """The run's controls by name, frozen, trained or read back; and what each is worth, as results.json has it."""
    made: dict[str, Any] = {}
    diagnoses: dict[str, Any] = {}
    for name in controls_of(setup.settings):
        made[name], diagnoses[name] = _prepare(setup, teacher, name)
    return made, diagnoses


def _prepare(setup: Setup, teacher: nn.Module, name: str) -> tuple[Any, dict[str, Any]]:
    settings, control, path, progress = setup.settings, CONTROLS[name], setup.folder.control(name), setup.progress
    with seeded(settings.seed):
        module = control.build(settings.teacher_features().channels, settings.rate)
    place(module, torch.device(settings.device)).requires_grad_(False).eval()
    drawn = settings.paraphraser_steps * settings.paraphraser_batch_size if control.learns else 0
    progress.begin(f"control {name}", drawn)
    start = time.perf_counter()
    description = setup.describe("control", {"name": name, "rate": settings.rate})

    def make() -> None:
        held_out, fitted = setup.train.stratified(settings.paraphraser_held_out)
        if control.learns:
            features = teacher_features(teacher, fitted, setup.precision)
            train_paraphraser(module, features, settings, setup.precision, progress.advance, penalty=control.penalty)
        features = teacher_features(teacher, held_out, setup.precision)
        with setup.precision.autocast():
            diagnosis = asdict(diagnose_paraphraser(module, features))
        setup.keep(path, Checkpoint(module.state_dict(), {}, {**description, "diagnosis": diagnosis}))

    finished = setup.finished(path, description, make)
    checkpoint.fill(module, finished.tensors, path, f"the control {name}")
    module.requires_grad_(False).eval()
    progress.end()
    diagnosis = finished.description["diagnosis"]
    progress.say(
        f"control {name}: explains {diagnosis['explained_variance']:.3f} of the variance of held-out features, spread "
        f"{diagnosis['spread']:.2f} of that of random factors, {time.perf_counter() - start:.1f} s"
    )
    return module, diagnosis
