"""One student: its model, its translator where the method has one, and its training."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ftfast.distill.data import Split
from ftfast.distill.engine import Precision, Schedule, Training, evaluate
from ftfast.distill.methods import METHODS, Outputs, Terms, Weights
from ftfast.distill.models import LAST_STAGE, ResNet, place, seeded
from ftfast.distill.settings import Settings
from ftfast.distill.teacher import Teacher, build, student_description
from ftfast.features import FeatureTap
from ftfast.head import FactorTransfer
from ftfast.modules import Paraphraser, Translator


@dataclass(frozen=True)
class Guides:
    """What students learn from beside the labels, all of it frozen."""

    teacher: Teacher
    paraphraser: Paraphraser | None


def build_student(settings: Settings, seed: int) -> ResNet:
    """A student's model; one seed gives the same weights whatever the method, so methods compare in pairs."""
    return build(student_description(settings), settings.data, seed=seed, device=torch.device(settings.device))


def student_training(
    settings: Settings,
    precision: Precision,
    guides: Guides,
    split: Split,
    *,
    method: str,
    weights: Weights,
    seed: int,
    epochs: int | None = None,
    watched: Split | None = None,
) -> Training:
    """The training of one student, ready to run; its learner has the student as ``model``.

    Args:
        split: the images to learn from, in an order that ``seed`` decides, the same for every method.
        epochs: in place of the settings' ``student_epochs``.
        watched: images on which the accuracy is recorded after every epoch; nothing is decided by it.
    """
    chosen = METHODS[method]
    student = build_student(settings, seed)
    learner = nn.ModuleDict({"model": student})
    head = None
    if chosen.uses_factors:
        head = _head(settings, guides, weights, seed)
        learner["translator"] = head.translator
    tap = FeatureTap(student, LAST_STAGE)

    def terms(images: Tensor, labels: Tensor) -> Terms:
        taught = guides.teacher(images) if chosen.uses_teacher else None
        return chosen.terms(Outputs(*tap(images)), taught, labels, head, weights)

    schedule = Schedule(
        epochs or settings.student_epochs,
        settings.batch_size,
        settings.learning_rate,
        settings.momentum,
        settings.weight_decay,
    )
    accuracy = None if watched is None else lambda: evaluate(student, watched, precision)[0]
    return Training(learner, terms, split, schedule, precision, seed=seed, accuracy=accuracy)


def _head(settings: Settings, guides: Guides, weights: Weights, seed: int) -> FactorTransfer:
    assert guides.paraphraser is not None
    assert weights.beta is not None
    with seeded(seed):
        translator = Translator(4 * settings.student_channels, guides.paraphraser.factor_channels)
    return FactorTransfer(guides.paraphraser, place(translator, torch.device(settings.device)), weight=weights.beta)
