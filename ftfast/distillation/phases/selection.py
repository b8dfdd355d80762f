"""The choice of every method's weights, on validation parts of the students' own training images.

This module is given no test images, so nothing in it can depend on them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from statistics import fmean

from ftfast.distillation.data.images import Images
from ftfast.distillation.phases.trainable import TeacherSide, student_training
from ftfast.distillation.runtime.processes import ALONE, Processes
from ftfast.distillation.settings.run_settings import Settings
from ftfast.distillation.training.evaluate import evaluate
from ftfast.distillation.training.losses import DivergedError
from ftfast.distillation.training.methods import METHODS
from ftfast.distillation.training.step.step import Precision
from ftfast.distillation.training.terms import Weights

# Selection draws students of its own, so that no final student was already seen by the choice.
FIRST_SEED = 10_000


@dataclass(frozen=True)
class Trial:
    """A method's weights by name, and what students learned with them.

    That is mean validation accuracy in percent and cross-entropy, both None where a student diverged.
    """

    weights: dict[str, float]
    accuracy: float | None
    loss: float | None


def candidates(settings: Settings, method: str) -> list[Weights]:
    """The weights that a method chooses from; one where the settings leave no choice."""
    used = METHODS[method].weights
    tried: list[Weights] = []
    for grid in settings.weight_grid():
        weights = Weights(**{name: grid[name] for name in used}, temperature=settings.temperature)
        if weights not in tried:
            tried.append(weights)
    return tried


def named(method: str, weights: Weights) -> dict[str, float]:
    """The weights that a method has, by name."""
    return {name: weights[name] for name in METHODS[method].weights}


def try_weights(
    settings: Settings,
    precision: Precision,
    teacher_side: TeacherSide,
    split: Images,
    method: str,
    weights: Weights,
    after_epoch: Callable[[int], None] = lambda _: None,
    processes: Processes = ALONE,
) -> Trial:
    """Trains students on all folds but one and judges them on that one, for each fold of ``split`` in turn.

    They take as many steps as the final students, who learn from all of ``split``. ``after_epoch`` is called with
    the number of images drawn.
    """
    scores = []
    for fold, (fitted, validated) in enumerate(split.folds(settings.validation_folds)):
        for repeat in range(settings.selection_seeds):
            training = student_training(
                settings,
                precision,
                teacher_side,
                fitted,
                method=method,
                weights=weights,
                seed=FIRST_SEED + fold * settings.selection_seeds + repeat,
                epochs=selection_epochs(settings),
                processes=processes,
            )
            try:
                training.run(lambda current: after_epoch(current.history[-1].images))
            except DivergedError:
                return Trial(named(method, weights), None, None)
            scores.append(evaluate(training.trainable["model"], validated, precision, processes))  # type: ignore[index]
    accuracies, losses = ([score.accuracy for score in scores], [score.cross_entropy for score in scores])
    return Trial(named(method, weights), fmean(accuracies), fmean(losses))


def selection_epochs(settings: Settings) -> int:
    """Epochs on all folds but one that take as many steps as ``student_epochs`` on all."""
    return max(1, round(settings.student_epochs * settings.validation_folds / (settings.validation_folds - 1)))


def trial_images(settings: Settings) -> int:
    """How many images the students of one trial draw."""
    rounds = settings.selection_seeds * selection_epochs(settings)
    return rounds * settings.student_images * (settings.validation_folds - 1)


def best(trials: list[Trial]) -> Trial | None:
    """The trial of the highest validation accuracy, of the lower loss where two are equal; None where all diverged."""
    finite = [trial for trial in trials if trial.accuracy is not None]
    return max(finite, key=lambda trial: (trial.accuracy, -(trial.loss or 0.0)), default=None)
