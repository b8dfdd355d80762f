"""The doctor's look at this run's own step, before the students train."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ftfast.diagnosis.doctor import doctor
from ftfast.distill.phases.selection import candidates
from ftfast.distill.phases.setup import Setup
from ftfast.distill.phases.trainable import TeacherSide, build_student, trainable_of
from ftfast.distill.settings.run_settings import schedule_of
from ftfast.distill.training.methods import METHODS
from ftfast.distill.training.step import LearningStep


def run_doctor(setup: Setup, teacher_side: TeacherSide) -> None:
    """Says what :func:`ftfast.doctor` finds in a step of the method that uses most of the teacher."""
    if not setup.processes.is_first:
        return
    settings = replace(setup.settings, compile="off")  # compiled modules cannot be watched
    method = max(settings.methods, key=lambda name: len(METHODS[name].weights))
    if not METHODS[method].needs or settings.engine == "plain":
        return
    student = build_student(settings, settings.seed)
    weights = candidates(settings, method)[0]
    trainable, terms = trainable_of(settings, teacher_side, student, method=method, weights=weights, seed=settings.seed)
    trainable.train()
    optimiser = LearningStep(trainable, terms, schedule_of(settings, 1), setup.precision).optimiser

    def loss(student: nn.Module, teacher: nn.Module, batch: Any) -> Tensor:
        with setup.precision.autocast():
            return torch.stack(list(terms(*batch).values())).sum()

    batch = next(iter(setup.students.draw(setup.part_size, seed=settings.seed, epoch=0)))
    findings = doctor(student, teacher_side.teacher, loss, batch, optimiser)
    for finding in findings:
        setup.progress.say(f"doctor: {finding}")
    if not findings:
        setup.progress.say(f"doctor: nothing slow or wrong in a step of {method}")
