"""Trainings that survive a kill: a checkpoint at the end, now and then one on the way, and one where asked to stop."""

import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ftfast.distill import checkpoint
from ftfast.distill.checkpoint import Checkpoint
from ftfast.distill.engine import Epoch, Stopped, Training
from ftfast.distill.errors import CheckpointError
from ftfast.distill.interrupts import Interrupted, StopRequest
from ftfast.distill.processes import ALONE, Agreement, Processes

_MODEL_PREFIX = "model."


def unfinished_folder(folder: Path) -> Path:
    """Where the checkpoints on the way to ``folder`` lie."""
    return folder.with_name(f"{folder.name}.unfinished")


def read_finished(folder: Path, expected: dict[str, Any]) -> Checkpoint | None:
    """The checkpoint of a training that has ended, or None where it has not.

    Args:
        expected: what its description has to say: ``"kind"``, ``"model"``, ``"data"``, ...

    Raises:
        CheckpointError: not as it was written, or of something else.
    """
    return _load_expected(folder, expected) if folder.exists() else None


def _load_expected(folder: Path, expected: dict[str, Any]) -> Checkpoint:
    found = checkpoint.load(folder)
    for name, value in expected.items():
        other = found.description.get(name)
        if other != value:
            raise CheckpointError(
                f"{folder} is not this run's {expected['kind']}: {name} is {other!r}, not {value!r}; "
                "remove the folder to have it made again."
            )
    return found


def history_of(finished: Checkpoint) -> list[Epoch]:
    """The epochs that led to a checkpoint."""
    return [Epoch(**record) for record in finished.state["history"]]


def finish(
    training: Training,
    folder: Path,
    description: dict[str, Any],
    *,
    checkpoint_seconds: float,
    after_epoch: Callable[[Training], None] = lambda _: None,
    resumed: Callable[[list[Epoch]], None] = lambda _: None,
    processes: Processes = ALONE,
) -> list[Epoch]:
    """Runs a training to its end, from its last checkpoint where there is one, and leaves its checkpoint at ``folder``.

    Args:
        description: what is trained, ``"kind"`` among it; the last epoch's ``"accuracy"`` is added at the end.
        checkpoint_seconds: the time between two checkpoints on the way; 0 keeps one after every step.
        after_epoch: called after each epoch that runs now.
        resumed: called with the epochs that had run before.
        processes: those that train together; the first one reads and writes, and all leave at the same step.

    Raises:
        CheckpointError: the last checkpoint is not as it was written, or of another training.
        Interrupted: a signal came; the training as it then stood has been saved.
    """
    on_the_way = unfinished_folder(folder)
    unfinished = {**description, "kind": f"unfinished {description['kind']}"}
    kept = processes.on_first(lambda: _newest(on_the_way, unfinished))
    if kept is not None:
        training.load_state(_state_of(kept))
        resumed(training.history)
    agreement = Agreement(processes)
    last_saved = time.monotonic()
    must_stop = False

    def save(training: Training) -> None:
        nonlocal last_saved
        name = f"epoch{len(training.history):05}"
        if training.steps_done():  # sorted after its epoch's own
            name += f"-step{training.steps_done():07}"
        content = _checkpoint_of(training, unfinished)
        if processes.is_first:
            if not (on_the_way / name).exists():
                checkpoint.save(on_the_way / name, content)
            for older in sorted(on_the_way.glob("epoch*"))[:-1]:
                shutil.rmtree(older)
        last_saved = time.monotonic()

    def save_now_and_then(training: Training) -> None:
        nonlocal must_stop
        is_due = time.monotonic() - last_saved >= checkpoint_seconds
        must_stop, is_due = agreement(asked(), is_due)
        if is_due and not must_stop:
            save(training)

    with StopRequest() as asked:
        try:
            history = training.run(after_epoch, lambda: must_stop, save_now_and_then)
            must_stop = any(agreement.hear()[:1])
        except Stopped:
            agreement.hear()
            save(training)
            must_stop = True
        if must_stop:
            raise Interrupted(asked.number or signal.SIGTERM)
        final = _checkpoint_of(training, {**description, "accuracy": history[-1].accuracy})
        if processes.is_first:
            checkpoint.save(folder, final)
            shutil.rmtree(on_the_way, ignore_errors=True)
    return history


def _newest(on_the_way: Path, expected: dict[str, Any]) -> Checkpoint | None:
    kept = sorted(on_the_way.glob("epoch*"))
    return _load_expected(kept[-1], expected) if kept else None


def _checkpoint_of(training: Training, description: dict[str, Any]) -> Checkpoint:
    state = training.state()
    learner = state["learner"]
    model = {name.removeprefix(_MODEL_PREFIX): learner[name] for name in learner if name.startswith(_MODEL_PREFIX)}
    rest = {name: tensor for name, tensor in learner.items() if not name.startswith(_MODEL_PREFIX)}
    return Checkpoint(model, {**state, "learner": rest}, description)


def _state_of(kept: Checkpoint) -> dict[str, Any]:
    model = {_MODEL_PREFIX + name: tensor for name, tensor in kept.tensors.items()}
    return {**kept.state, "learner": {**model, **kept.state["learner"]}}
