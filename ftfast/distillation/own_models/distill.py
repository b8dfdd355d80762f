"""distill: a student of one's own taught by a teacher of one's own, from loaders of one's own."""

import dataclasses
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from ftfast.distillation.data.from_loader import FromLoader
from ftfast.distillation.models.frozen_teacher import FrozenTeacher
from ftfast.distillation.models.registry import Outputs, Resized, place
from ftfast.distillation.monitor.epochs import Epoch
from ftfast.distillation.monitor.progress import Progress
from ftfast.distillation.monitor.telemetry import RunLog
from ftfast.distillation.monitor.trackers import DEFAULT, Trackers, tracker_names
from ftfast.distillation.own_models.folder import training_folder
from ftfast.distillation.own_models.numbers import Numbers, check_paraphraser, given_weights, precision_of
from ftfast.distillation.own_models.sides import Side, check_classes, check_models, common_size
from ftfast.distillation.runtime import checkpoint
from ftfast.distillation.runtime.checkpoint import Checkpoint
from ftfast.distillation.runtime.output_folder import folder_at
from ftfast.distillation.runtime.seeds import seed_generators
from ftfast.distillation.runtime.signals import Interrupted
from ftfast.distillation.training import resumable
from ftfast.distillation.training.evaluate import evaluate
from ftfast.distillation.training.loop import Training
from ftfast.distillation.training.losses import DivergedError
from ftfast.distillation.training.methods import METHODS, any_needs
from ftfast.distillation.training.paraphrasing.paraphraser import train_paraphraser
from ftfast.distillation.training.step.step import Precision
from ftfast.distillation.training.taught_student import taught_student
from ftfast.distillation.training.terms import Pair, customary
from ftfast.distillation.training.watched import Watched
from ftfast.errors import ParaphraserError, SettingsError
from ftfast.features.tap import FeatureTap
from ftfast.modules import Paraphraser


@dataclass(frozen=True)
class Distilled:
    """What :func:`ftfast.distill` returns.

    Attributes:
        student: the very module that was given, trained and in eval; with ``ema``, with the averaged weights.
        paraphraser: frozen and in eval; None where the method uses no factors.
        history: of every epoch ``losses`` (means by term), ``accuracy`` in percent, ``images`` and ``seconds``.
        accuracy: of ``val`` in percent after the last epoch; None without ``val``.
        output: the folder that was written; None where none was.
    """

    student: nn.Module
    paraphraser: Paraphraser | None
    history: tuple[Epoch, ...]
    accuracy: float | None
    output: Path | None


def distill(
    teacher: nn.Module,
    student: nn.Module,
    train: Iterable[Any],
    val: Iterable[Any] | None = None,
    *,
    teacher_layer: str,
    student_layer: str,
    method: str = "ft",
    epochs: int = 20,
    beta: float | None = None,
    weights: Mapping[str, float] | None = None,
    rate: float = 0.5,
    paraphraser: Paraphraser | None = None,
    resize_features: bool = False,
    optimizer: Literal["sgd", "adamw"] = "sgd",
    learning_rate: float | None = None,
    momentum: float = 0.9,
    weight_decay: float | None = None,
    warm_up: float = 0.0,
    schedule: Literal["cosine", "steps"] = "cosine",
    milestones: Sequence[int] = (),
    gamma: float = 0.1,
    clip_gradient: float | None = None,
    ema: float | None = None,
    graph: bool = True,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    output: str | Path | None = None,
    resume: bool = False,
    checkpoint_seconds: float = 30.0,
    track: str | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Distilled:
    """Trains a student of one's own under a teacher of one's own: the loop of ``ftfast distill``, in one process.

    The teacher is frozen as by :class:`ftfast.FrozenTeacher`, the paraphraser trained as by
    :func:`ftfast.train_paraphraser` and kept, and the student trained in place. Teacher and student are moved to the
    device; torch's random state is left as it was. In a notebook or on a terminal there are bars.

    What a loader draws from torch's generator in this process, such as the order of ``DataLoader(..., shuffle=True)``,
    follows from ``seed``, so that the same call gives the same student, and a training that was stopped anywhere goes
    on to the same numbers. A loader with a ``generator`` of its own, random draws by numpy or Python, and persistent
    workers go on otherwise after a stop within an epoch: the rest of that epoch then has other images.

    Args:
        teacher: images ``[N, C, H, W]`` to logits ``[N, classes]``, trained, float32.
        student: the same, to be trained, float32.
        train: a DataLoader, or anything with a length that gives batches ``(images, labels)`` each time it is gone
            through: floating ``[N, C, H, W]`` and whole numbers ``[N]``. Its batches are taken as they are.
        val: the same, for an accuracy after each epoch, by which nothing is decided.
        teacher_layer, student_layer: submodules whose outputs are compared: maps ``[N, C, H, W]``, timm's maps in NHWC,
            or the tokens ``[N, L, C]`` of a vision transformer, of which the class token is dropped where the model's
            ``num_prefix_tokens`` counts it.
        method: ``"none"``, ``"kd"``, ``"at"``, ``"fitnet"``, ``"ft"``, ``"ft+kd"`` or ``"at+kd"``.
        epochs: over ``train``.
        beta: the weight of the factor transfer loss; None takes 500 * sqrt(D / 2048) for factors of D numbers.
        weights: the others by name: ``"attention"`` (1000), ``"hint"`` (10), ``"alpha"`` of the soft labels (0.7) and
            their ``"temperature"`` (4).
        rate: of a new paraphraser, as :class:`ftfast.Paraphraser`.
        paraphraser: one trained before on this teacher's layer.
        resize_features: pool the larger of the two maps to the smaller; maps of unlike sizes are refused otherwise.
        optimizer: SGD with Nesterov's momentum, or AdamW, whose first beta ``momentum`` then is.
        learning_rate: the first one; None takes 0.05 for SGD and 1e-3 for AdamW.
        weight_decay: None takes 5e-4 of all parameters for SGD. AdamW, by default 0.05, spares biases and norms.
        warm_up: epochs over which the rate rises to its first value.
        schedule: to 0 along a cosine, or times ``gamma`` after each epoch of ``milestones``.
        clip_gradient: the largest L2 norm of all gradients together.
        ema: decay of the average of the weights over steps, which the student has in the end.
        graph: on a GPU the step is replayed as a CUDA graph, as by :func:`ftfast.capture_step`, so that Python in the
            models runs once; False for models that decide something in Python at every call.
        device: None takes the student's where that is a GPU, else a GPU where there is one.
        dtype: of the arithmetic; None takes bfloat16 where the hardware has it, else float32.
        output: a folder for checkpoints (``student``, ``paraphraser``), ``telemetry.jsonl`` and TensorBoard's files;
            Ctrl-C saves there before it ends.
        resume: go on with the training in ``output``, which has the same arguments; with a finished one, read it.
        checkpoint_seconds: the time between two checkpoints on the way.
        track: who is told of settings, losses and accuracies, as ``ftfast distill --track``: some of ``"tensorboard"``,
            ``"wandb"``, ``"trackio"`` and ``"mlflow"``, separated by commas. It takes an ``output``, with which None is
            TensorBoard.
        seed: of the translator, the paraphraser, the loader's order and dropout.
        progress: bars, and a line for the end.

    Raises:
        SettingsError: an argument out of range, or models and layers that do not go together.
        LoaderError, TypeError: a loader that gives something else.
        ValueError: a layer that the model does not have; the message has the nearest names.
        TeacherError, ParaphraserError: as FrozenTeacher and train_paraphraser.
        RunFolderError, CheckpointError: an output that holds something else, or other arguments.
        DivergedError: the loss is not finite; the last checkpoint before it is kept.
        KeyboardInterrupt: Ctrl-C or SIGTERM; with ``output``, ``resume=True`` goes on from there.
    """
    numbers = Numbers.of(locals())
    given = given_weights(method, beta, weights)
    if resume and output is None:
        raise SettingsError("resume is True and output is None; give the folder of the training to go on with.")
    if track is not None and output is None:
        raise SettingsError(f"track is {track!r} and output is None; give a folder, in which the tracked run is named.")
    for name, value, kinds, taken in (("output", output, str | PathLike, "a path"), ("track", track, str, "a string")):
        if value is not None and not isinstance(value, kinds):
            raise TypeError(f"{name} is a {type(value).__name__}; it takes {taken} or None.")
    told = () if output is None else tracker_names(DEFAULT if track is None else track)
    check_models(teacher, student)
    precision = precision_of(device, dtype, student)
    home = precision.device
    batches = FromLoader(train, "train", home)
    watched = None if val is None else FromLoader(val, "val", home)
    with torch.random.fork_rng(devices=[home] if home.type == "cuda" else []), ExitStack() as stack:
        seed_generators(seed, home)
        images, labels = batches.first()
        of_teacher = Side.of("teacher", place(teacher, home), teacher_layer, images, precision)
        of_student = Side.of("student", place(student, home), student_layer, images, precision)
        for given_batches in (batches, watched):
            if given_batches is not None:
                given_batches.classes = of_student.classes
        batches.check_labels(labels)
        check_classes(method, of_teacher, of_student)
        height, width = common_size(method, of_teacher, of_student, pools=resize_features)
        factor_channels = max(1, round(of_teacher.channels * rate))
        if paraphraser is not None:
            factor_channels = check_paraphraser(paraphraser, of_teacher.channels)
        factor_size = factor_channels * height * width
        chosen = {name: round(customary(name, factor_size), 4) for name in METHODS[method].weights}
        chosen |= {name: value for name, value in given.items() if name in chosen or name == "temperature"}
        settings = {
            "method": method,
            "weights": chosen,
            "teacher_layer": teacher_layer,
            "student_layer": student_layer,
            "dtype": str(precision.dtype).removeprefix("torch."),
            **dataclasses.asdict(numbers),
        }
        settings["milestones"] = list(numbers.milestones)
        del settings["checkpoint_seconds"]  # which changes nothing that is computed
        folder = (
            None if output is None else stack.enter_context(training_folder(folder_at(output), settings, resume=resume))
        )
        trackers = Trackers(told, folder or Path())
        trackers.begin(settings)
        taught: nn.Module | None = None
        if METHODS[method].needs:
            has_logits = any_needs([method], "logits")
            frozen = FrozenTeacher(teacher, teacher_layer, dtype=precision.dtype, classifier=has_logits, example=images)
            taught = Resized(frozen, (height, width), of_teacher.as_map)
        if not any_needs([method], "factors"):
            paraphraser = None
        elif paraphraser is None:
            assert taught is not None
            paraphraser = _trained_paraphraser(
                taught, of_teacher.channels, batches, numbers, precision, folder, progress=progress
            )
        else:
            place(paraphraser, home)
        tap = stack.enter_context(FeatureTap(student, student_layer))
        trainable, terms = taught_student(
            student,
            Resized(lambda images: Outputs(*tap(images)), (height, width), of_student.as_map),
            student if taught is None else taught,
            method=method,
            pair=Pair(of_student.channels, of_teacher.channels, paraphraser, chosen),
            device=home,
            seed=seed,
        )
        training = Training(
            trainable,
            terms,
            batches,
            numbers.to_schedule(len(images)),
            precision,
            seed=seed,
            evaluation=None if watched is None else lambda stop: evaluate(student, watched, precision, stop=stop),
            replayed=graph and home.type == "cuda",
            frozen=[module for module in (taught, paraphraser) if module is not None],
        )
        in_an_epoch = len(images) * len(batches)  # as far as is known before
        history = _run(
            training, settings, folder, precision, checkpoint_seconds, in_an_epoch, trackers, progress=progress
        )
    return Distilled(student.eval(), paraphraser, tuple(history), history[-1].accuracy, folder)


def _trained_paraphraser(
    taught: nn.Module,
    channels: int,
    batches: FromLoader,
    numbers: Numbers,
    precision: Precision,
    folder: Path | None,
    *,
    progress: bool,
) -> Paraphraser:
    """A new paraphraser, or the one that the folder has already."""
    path = None if folder is None else folder / "paraphraser"
    description = {"kind": "paraphraser", "model": {"in_channels": channels, "rate": numbers.rate}}
    found = None if path is None else resumable.read_finished(path, description)
    if path is not None and found is not None:
        kept = place(Paraphraser(channels, numbers.rate), precision.device)
        checkpoint.fill(kept, found.tensors, path, "this paraphraser")
        return kept.eval()
    try:
        made = train_paraphraser(
            taught,
            batches,
            rate=numbers.rate,
            seed=numbers.seed,
            device=precision.device,
            dtype=precision.dtype,
            progress=progress,
        )
    except ParaphraserError as error:
        what = str(error).partition(";")[0]
        raise ParaphraserError(
            f"{what}; see that teacher is trained, and give an earlier teacher_layer, or a paraphraser of "
            "ftfast.train_paraphraser with more steps."
        ) from None
    if path is not None:
        checkpoint.save(path, Checkpoint(made.state_dict(), {}, description))
    return made


def _run(
    training: Training,
    settings: dict[str, Any],
    folder: Path | None,
    precision: Precision,
    checkpoint_seconds: float,
    images: int,
    trackers: Trackers,
    *,
    progress: bool,
) -> list[Epoch]:
    """Trains to the end, seen and, into a folder, kept; or reads what is finished there."""
    model = training.trainable.get_submodule("model")
    description = {"kind": "student of one's own", "settings": settings}
    path = None if folder is None else folder / "student"
    if path is not None and (finished := resumable.read_finished(path, description)) is not None:
        checkpoint.fill(model, finished.tensors, path, "this student")
        return resumable.history_of(finished)
    start = time.perf_counter()
    try:
        with Progress(training.epochs * images, quiet=not progress) as shown:
            shown.begin("student", training.epochs * images)
            trackers.say = shown.say_once
            if path is not None:
                assert folder is not None
                watched = Watched(
                    root=folder,
                    precision=precision,
                    progress=shown,
                    trackers=trackers,
                    checkpoint_seconds=checkpoint_seconds,
                )
                watched.train_to_end(training, path, description)
            else:
                training.say = shown.say_once
                training.log = RunLog(None, "student", precision.device, None, advance=shown.advance)
                training.run(lambda it: shown.end_epoch("student", it.epochs, it.history[-1]))
            last = training.history[-1]
            found = "" if last.accuracy is None else f"{last.accuracy:.2f} % of val, "
            loss = sum(last.losses.values())
            figures = {"loss": loss} if last.accuracy is None else {"accuracy": last.accuracy, "loss": loss}
            row = (settings["method"], *(f"{value:.4g}" for value in figures.values()))
            trackers.finish(("method", *figures), [row], figures)
            shown.say(f"{settings['method']}: {found}loss {loss:.4g}, {time.perf_counter() - start:.1f} s")
    except DivergedError as error:
        what = str(error).partition(";")[0].partition(". Lower")[0]
        raise DivergedError(f"{what}; lower learning_rate or the weights, or give clip_gradient.") from None
    except Interrupted as end:
        raise Interrupted(end.number, f"distill(..., output={str(folder)!r}, resume=True) goes on") from None
    return training.history
