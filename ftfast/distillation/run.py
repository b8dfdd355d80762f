"""A whole run: teacher, paraphraser, weights, students. Each phase keeps its result, which a resumed run reads."""

import json
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ftfast import dispatch
from ftfast.diagnosis.doctor import doctor
from ftfast.distillation.data import datasets
from ftfast.distillation.data.photographs.readers import translate_reader_errors
from ftfast.distillation.monitor.progress import Progress
from ftfast.distillation.monitor.telemetry import SECONDS_BETWEEN_LINES
from ftfast.distillation.monitor.trackers import DEFAULT, Trackers, tracker_names
from ftfast.distillation.phases.controls import controls_images, prepare_controls
from ftfast.distillation.phases.paraphraser import paraphraser_images, prepare_paraphraser, read_paraphraser
from ftfast.distillation.phases.report import HEADINGS, method_rows
from ftfast.distillation.phases.results import collect
from ftfast.distillation.phases.run_folder import RunFolder, check_run_folder, is_of_one, open_run_folder
from ftfast.distillation.phases.selection import candidates, trial_images
from ftfast.distillation.phases.setup import Setup, algorithms, load_images, precision_of
from ftfast.distillation.phases.students import select_weights, train_students
from ftfast.distillation.phases.teacher import prepare_teacher, read_teacher
from ftfast.distillation.phases.trainable import TeacherSide, build_student, trainable_of
from ftfast.distillation.runtime import files, torchrun
from ftfast.distillation.runtime.processes import Processes, joined, translate_distributed_errors
from ftfast.distillation.settings.run_settings import DTYPES, Settings, schedule_of
from ftfast.distillation.store import teacher_side as stored_side
from ftfast.distillation.training.methods import METHODS, any_needs
from ftfast.distillation.training.step.step import LearningStep
from ftfast.errors import RunFolderError, SettingsError


def run(
    settings: Settings,
    output: Path,
    *,
    resume: bool = False,
    checkpoint_seconds: float = 30.0,
    checkpoints_kept: int = 3,
    telemetry_seconds: float = SECONDS_BETWEEN_LINES,
    track: str = DEFAULT,
) -> dict[str, Any]:
    """Runs what the settings say into a folder; returns the content of its results.json.

    Args:
        output: the run folder, new or, with ``resume``, that of a run with the same settings; processes that torchrun
            starts anew resume their run.
        checkpoint_seconds: the time between two checkpoints of one training.
        checkpoints_kept: of each training, the newest.
        telemetry_seconds: the time between two lines of ``telemetry.jsonl``.
        track: names of :data:`ftfast.distillation.monitor.trackers.LIBRARIES`, separated by commas, who are told of the
            settings, each training and the table.

    Raises:
        DistillError: in one sentence, before anything is written where that can be known before.
    """
    settings, names = settings.resolved(), tracker_names(track)
    with ExitStack() as stack:
        stack.enter_context(translate_distributed_errors())
        stack.enter_context(translate_reader_errors())
        processes = stack.enter_context(joined(settings.device))

        # What started the processes of the run, on all machines.
        agents = {agent for agent in processes.gather(torchrun.agent()) if agent is not None}

        def open_folder() -> bool:
            # The number of restarts stays what it is where a machine came or went, so it tells of restarts at best.
            is_restart = is_of_one(output, agents) if agents else torchrun.restarts() > 0
            goes_on = resume or is_restart
            check_run_folder(output, settings, resume=goes_on)
            _check(settings, processes)
            is_new = not RunFolder(output).settings.exists()
            stack.enter_context(open_run_folder(output, settings, resume=goes_on, agents=agents))
            return resume and is_new

        starts_anew = processes.on_first(open_folder)
        keeping = {
            "checkpoint_seconds": checkpoint_seconds,
            "checkpoints_kept": checkpoints_kept,
            "telemetry_seconds": telemetry_seconds,
        }
        trackers = Trackers(names if processes.is_first else (), output)
        return _run_in(RunFolder(output), settings, processes, trackers, keeping, starts_anew=starts_anew)


def _check(settings: Settings, processes: Processes) -> None:
    """What can be known before anything is written."""
    ranks = processes.part.ranks
    for name in ("batch_size", "paraphraser_batch_size"):
        # Batches of an epoch are of nearly equal size: none is less than half of the largest.
        if processes.are_many and getattr(settings, name) < 2 * ranks:
            raise SettingsError(
                f"{name} is {getattr(settings, name)}, which {ranks} processes share; it takes at least {2 * ranks}."
            )
    smallest = settings.batch_size // (2 * ranks)
    if settings.sync_batch_norm and settings.accumulate > max(1, smallest):
        raise SettingsError(
            f"accumulate is {settings.accumulate}, more than the {smallest} images that a process may get; with "
            "--sync-batch-norm all take equally many parts: give a lower one, or a larger --batch-size."
        )
    datasets.check_files(settings.data, settings.image_source())
    if settings.store is not None:
        stored_side.check(settings)
    else:
        if settings.teacher_source() is not None:
            read_teacher(settings)
        if settings.paraphraser_checkpoint is not None:
            read_paraphraser(settings)
    _check_backend(settings)


def _run_in(
    folder: RunFolder,
    settings: Settings,
    processes: Processes,
    trackers: Trackers,
    keeping: dict[str, Any],
    *,
    starts_anew: bool,
) -> dict[str, Any]:
    start = time.perf_counter()
    with (
        algorithms(settings.threads, repeatable=settings.deterministic == "on"),
        Progress(_planned_images(settings), quiet=not processes.is_first) as progress,
        ExitStack() as stack,
    ):
        trackers.say = progress.say_once
        processes.on_first(lambda: trackers.begin(settings.to_json()))
        if starts_anew:
            progress.say(f"{folder.path} holds no run yet: --resume starts a new run")
        for epochs in sorted({settings.teacher_epochs, settings.student_epochs}):
            if (warning := schedule_of(settings, epochs).warning) is not None:
                progress.say(f"warning: {warning}")
        if settings.device == "cuda" and (reason := settings.why_no_graph("cuda")):
            progress.say(f"warning: the step is not replayed as a CUDA graph: {reason}")
        train, test = load_images(settings, report=progress.say)
        stored = None if settings.store is None else stored_side.stored_images(settings, train)
        train = stored or train
        students, _ = train.stratified(settings.student_images)
        stack.callback(train.close)
        stack.callback(students.close)
        setup = Setup(
            settings=settings,
            precision=precision_of(settings),
            root=folder.path,
            progress=progress,
            processes=processes,
            trackers=trackers,
            train=train,
            students=students,
            test=test,
            **keeping,
        )
        how_frozen = ""
        judged_controls: dict[str, Any] = {}
        if stored is not None:
            teacher_side, teacher_checkpoint, diagnosis = stored_side.stored_teacher_side(setup, stored.store)
        else:
            teacher, teacher_checkpoint, how_frozen = prepare_teacher(setup)
            paraphraser, diagnosis = prepare_paraphraser(setup, teacher)
            controls, judged_controls = prepare_controls(setup, teacher)
            teacher_side = TeacherSide(teacher, paraphraser, controls)
            _run_doctor(setup, teacher_side)
        trials = select_weights(setup, teacher_side)
        methods = {method: train_students(setup, teacher_side, method, trials[method]) for method in settings.methods}
    results = collect(settings, teacher_checkpoint, diagnosis, trials, methods, time.perf_counter() - start)
    if how_frozen:
        results["teacher"]["frozen"] = how_frozen
    if judged_controls:
        results["controls"] = judged_controls
    if processes.are_many:
        results["hardware"]["processes"] = processes.part.ranks

    def write() -> dict[str, Any]:
        results.update(_earlier_record(folder))
        files.write_json(folder.results, results)
        means = {f"accuracy/{name}": method["mean"] for name, method in results["methods"].items()}
        trackers.finish(HEADINGS, method_rows(results), means)
        return results

    return processes.on_first(write)


def _run_doctor(setup: Setup, teacher_side: TeacherSide) -> None:
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
    for finding in doctor(student, teacher_side.teacher, loss, batch, optimiser):
        setup.progress.say(f"doctor: {finding}")


def _check_backend(settings: Settings) -> None:
    """FTFAST_BACKEND is met now, or the run ends before it has begun."""
    if not any_needs(settings.methods, "factors"):
        return
    factor = torch.empty(2, 1, device=settings.device, dtype=DTYPES[settings.dtype])
    try:
        dispatch.choose("auto", factor, factor)
    except (ValueError, RuntimeError) as error:
        raise SettingsError(f"FTFAST_BACKEND cannot be met: {error}") from None


def _earlier_record(folder: RunFolder) -> dict[str, Any]:
    """When and on what a run was finished, where it is only read back now."""
    if not folder.results.exists():
        return {}
    try:
        earlier = json.loads(folder.results.read_text())
        return {name: earlier[name] for name in ("seconds", "hardware", "memory", "software")}
    except (ValueError, KeyError, TypeError):
        raise RunFolderError(f"{folder.results} is not as it was written; remove it to have it made anew.") from None


def _planned_images(settings: Settings) -> int:
    """How many images all phases draw."""
    images = 0
    if settings.store is None:
        images += settings.teacher_epochs * settings.dataset().train_images
        if any_needs(settings.methods, "factors"):
            images += paraphraser_images(settings)
        images += controls_images(settings)
    for method in settings.methods:
        trials = len(candidates(settings, method))
        images += trials * trial_images(settings) if trials > 1 else 0
        images += settings.seeds * settings.student_epochs * settings.student_images
    return images
