"""The phases of the students: the choice of each method's weights, then one student for each seed."""

import json
import math
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from ftfast.distillation.phases import selection
from ftfast.distillation.phases.results import method_line, student_result
from ftfast.distillation.phases.setup import Setup
from ftfast.distillation.phases.trainable import TeacherSide, student_description, student_training
from ftfast.distillation.runtime import files
from ftfast.distillation.settings.run_settings import Settings
from ftfast.distillation.training import resumable
from ftfast.distillation.training.methods import METHODS
from ftfast.distillation.training.terms import Weights
from ftfast.errors import IN_A_NEW_RUN, DistillError, RunFolderError


def select_weights(setup: Setup, teacher_side: TeacherSide) -> dict[str, list[selection.Trial]]:
    """Every method's trials; they are kept one by one, so that a kill loses one at most."""
    settings, progress = setup.settings, setup.progress
    path = setup.folder.selection
    kept = setup.processes.on_first(lambda: _read_trials(path, settings))
    for method in settings.methods:
        candidates = selection.candidates(settings, method)
        trials = kept.setdefault(method, [])
        if len(candidates) > 1:
            images = selection.trial_images(settings)
            progress.begin(f"weights of {method}", len(candidates) * images)
            progress.skip(len(trials) * images)
            start = time.perf_counter()
            for weights in candidates[len(trials) :]:
                trial = selection.try_weights(
                    settings,
                    setup.precision,
                    teacher_side,
                    setup.students,
                    method,
                    weights,
                    progress.advance,
                    setup.processes,
                )
                trials.append(trial)
                if setup.processes.is_first:
                    files.write_json(path, {name: [asdict(row) for row in rows] for name, rows in kept.items()})
            progress.say(f"weights of {method}: {_chosen_line(trials)}, {time.perf_counter() - start:.1f} s")
            progress.end()
    return kept


def _read_trials(path: Path, settings: Settings) -> dict[str, list[selection.Trial]]:
    if not path.exists():
        return {}
    try:
        rows = json.loads(path.read_text())
        kept = {method: [selection.Trial(**row) for row in trials] for method, trials in rows.items()}
        written = all(_are_trials_of(settings, method, trials) for method, trials in kept.items())
    except (ValueError, TypeError, AttributeError):
        written = False
    if not written:
        raise RunFolderError(f"{path} is not as it was written; remove it to choose the weights anew.")
    return kept


def _are_trials_of(settings: Settings, method: str, trials: list[selection.Trial]) -> bool:
    if method not in settings.methods:
        return False
    planned = [selection.named(method, weights) for weights in selection.candidates(settings, method)]
    if [trial.weights for trial in trials] != planned[: len(trials)]:
        return False
    scores = [(trial.accuracy, trial.loss) for trial in trials]
    return all(
        score == (None, None) or all(isinstance(value, float) and math.isfinite(value) for value in score)
        for score in scores
    )


def _chosen_line(trials: list[selection.Trial]) -> str:
    chosen = selection.best(trials)
    if chosen is None:
        return "all diverged"
    weights = [f"{name} {value:g}" for name, value in chosen.weights.items()]
    return f"{', '.join(weights)} ({chosen.accuracy:.2f} % in validation)"


def chosen_weights(settings: Settings, method: str, trials: list[selection.Trial]) -> Weights:
    """The weights of a method's final students.

    Raises:
        DistillError: every weight that was tried made a student diverge.
    """
    if not trials:
        return selection.candidates(settings, method)[0]
    chosen = selection.best(trials)
    if chosen is None:
        raise DistillError(
            f"every weight tried for {method} diverged; lower --learning-rate or "
            f"{' or '.join(f'--{name}' for name in METHODS[method].weights)} {IN_A_NEW_RUN}."
        )
    return Weights(**chosen.weights, temperature=settings.temperature)


def train_students(
    setup: Setup, teacher_side: TeacherSide, method: str, trials: list[selection.Trial]
) -> tuple[Weights, list[dict[str, Any]]]:
    """A method's weights and its finished students, as results.json has them."""
    settings, progress = setup.settings, setup.progress
    weights = chosen_weights(settings, method, trials)
    progress.begin(f"students of {method}", settings.seeds * settings.student_epochs * len(setup.students))
    start = time.perf_counter()

    def train(seed: int, path: Path, description: dict[str, Any]) -> None:
        training = student_training(
            settings,
            setup.precision,
            teacher_side,
            setup.students,
            method=method,
            weights=weights,
            seed=seed,
            watched=setup.test,
            processes=setup.processes,
        )
        setup.train_to_end(training, path, description)

    results = []
    for seed in range(settings.seeds):
        path = setup.folder.student(method, seed)
        named = {"method": method, "seed": seed, "weights": weights}
        description = setup.describe("student", student_description(settings), **named)
        if path.exists():
            progress.skip(settings.student_epochs * len(setup.students))
        finished = setup.finished(path, description, partial(train, seed, path, description))
        results.append(student_result(seed, resumable.history_of(finished)))
    progress.end()
    progress.say(f"{method}: {method_line(results)}, {time.perf_counter() - start:.1f} s")
    return weights, results
