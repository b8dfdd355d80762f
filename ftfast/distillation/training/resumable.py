"""Trainings that survive a kill: a checkpoint at the end, now and then one on the way, and one where asked to stop."""

import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from ftfast.distillation.data import class_names
from ftfast.distillation.data.photographs.readers import translate_reader_errors
from ftfast.distillation.monitor.epochs import Epoch
from ftfast.distillation.runtime import checkpoint
from ftfast.distillation.runtime.checkpoint import Checkpoint
from ftfast.distillation.runtime.processes import ALONE, Agreement, Processes
from ftfast.distillation.runtime.signals import Interrupted, Stopped, StopRequest
from ftfast.distillation.runtime.snapshots import Snapshots, is_finite
from ftfast.distillation.training.loop import Training
from ftfast.distillation.training.losses import DivergedError
from ftfast.errors import IN_A_NEW_RUN, CheckpointError, DataError, shown

_MODEL_PREFIX = "model."


def unfinished_folder(folder: Path) -> Path:
    """Where the checkpoints on the way to ``folder`` lie."""
    return folder.with_name(f"{folder.name}.unfinished")


def read_finished(folder: Path, expected: dict[str, Any]) -> Checkpoint | None:
    """The checkpoint of a training that has ended, or None where it has not.

    What a kill has left of the way there is removed.

    Args:
        expected: what its description has to say: ``"kind"``, ``"model"``, ``"data"``, ...

    Raises:
        CheckpointError: not as it was written, or of something else.
    """
    if not folder.exists():
        return None
    try:
        found = checkpoint.load(folder)
    except CheckpointError as error:
        raise CheckpointError(f"{str(error).rstrip('.')}; remove {folder} to have it made again.") from None
    _check_expected(found, folder, expected)
    shutil.rmtree(unfinished_folder(folder), ignore_errors=True)
    return found


def _check_expected(found: Checkpoint, folder: Path, expected: dict[str, Any]) -> None:
    class_names.check_same(folder, found.description, expected)  # checkpoints had none before they were kept
    for name, value in expected.items():
        other = found.description.get(name)
        if other != value and name != class_names.KEY:
            raise CheckpointError(
                f"{folder} is not this run's {expected['kind']}: {name} is {shown(repr(other))}, not {value!r}; "
                "remove the folder to have it made again."
            )


def history_of(finished: Checkpoint) -> list[Epoch]:
    """The epochs that led to a checkpoint."""
    return [Epoch(**record) for record in finished.state["history"]]


def train_to_end(
    training: Training,
    folder: Path,
    description: dict[str, Any],
    *,
    checkpoint_seconds: float,
    kept: int = 3,
    after_epoch: Callable[[Training], None] = lambda _: None,
    resumed: Callable[[list[Epoch]], None] = lambda _: None,
    say: Callable[[str], None] = lambda _: None,
    paused: Callable[[float], None] = lambda _: None,
    processes: Processes = ALONE,
) -> list[Epoch]:
    """Runs a training to its end, from its last checkpoint where there is one, and leaves its checkpoint at ``folder``.

    Checkpoints on the way are written beside the training; one that cannot be, as on a full disk, is told of and does
    not end it.

    Args:
        description: what is trained, ``"kind"`` among it; the last epoch's ``"accuracy"`` is added at the end.
        checkpoint_seconds: the time between two checkpoints on the way, which become due only when the one before is
            written; 0 keeps one after every step and waits for it.
        kept: checkpoints on the way that stay.
        after_epoch: called after each epoch that runs now.
        resumed: called with the epochs that had run before.
        say: takes a line about checkpoints that are damaged or cannot be written.
        paused: called with the seconds that the training stood still for each checkpoint on the way.
        processes: those that train together; the first one reads and writes, and all leave at the same step.

    Raises:
        CheckpointError: no checkpoint on the way is as it was written, or it is of another training.
        DataError: of the images; a training of one process has been saved as it stood before the step that lacks them.
        DivergedError: the loss or what was learned is not finite; the last checkpoint that is finite stands.
        Interrupted: a signal came; the training as it then stood has been saved.
        OSError: the result cannot be written; the checkpoints on the way stand.
    """
    unfinished = {**description, "kind": f"unfinished {description['kind']}"}
    agreement = Agreement(processes)
    signal_heard, save_heard, has_asked = 0, False, False
    last_saved = time.monotonic()

    def save(training: Training) -> None:
        nonlocal last_saved
        start = time.perf_counter()
        content = _checkpoint_of(training, unfinished)
        if processes.is_first:
            snapshots.save(_name_of(training), content)
            snapshots.is_idle(wait=checkpoint_seconds == 0)
            paused(time.perf_counter() - start)
        last_saved = time.monotonic()

    def save_last(training: Training) -> None:
        """Nobody leaves before it is written: torchrun soon ends the processes that are left."""
        content = _checkpoint_of(training, unfinished)
        processes.on_first(lambda: snapshots.save(_name_of(training), content, is_last=True))

    def must_stop(*, is_due: bool = False) -> bool:
        nonlocal signal_heard, save_heard
        number, save_now = agreement(asked.number or 0, is_due)
        signal_heard, save_heard = signal_heard or number, save_heard or bool(save_now)
        return bool(signal_heard)

    def save_now_and_then(training: Training) -> None:
        nonlocal has_asked, save_heard
        is_due = processes.is_first and not has_asked and snapshots.is_idle()
        is_due = is_due and time.monotonic() - last_saved >= checkpoint_seconds
        stops = must_stop(is_due=is_due)
        has_asked = has_asked or is_due
        if save_heard:  # many processes agree one step later, or in the evaluation before this one
            save_heard = has_asked = False
            if not stops:
                save(training)

    with Snapshots(unfinished_folder(folder), kept=kept, say=say) as snapshots, StopRequest() as asked:
        found = processes.on_first(lambda: _newest(snapshots, unfinished))
        if found is not None:
            training.load_state(_state_of(found))
            resumed(training.history)
        try:
            with translate_reader_errors():
                history = training.run(after_epoch, lambda: bool(signal_heard), save_now_and_then, must_stop)
        except Stopped:
            agreement.hear()
            save_last(training)
            raise Interrupted(signal_heard) from None
        except DataError:
            # The others are in a step that this one never comes to, and no sums of theirs can be had.
            if training.is_between_steps and not processes.are_many:
                with suppress(DivergedError):
                    save_last(training)
            raise
        final = _checkpoint_of(training, {**description, "accuracy": history[-1].accuracy})
        processes.on_first(lambda: _keep(final, folder, snapshots))
        if number := agreement.settle(asked.number or 0, False)[0]:
            raise Interrupted(number)
    return history


def _newest(snapshots: Snapshots, expected: dict[str, Any]) -> Checkpoint | None:
    found = snapshots.newest()
    if found is None:
        return None
    folder, kept = found
    _check_expected(kept, folder, expected)
    return kept


def _keep(final: Checkpoint, folder: Path, snapshots: Snapshots) -> None:
    snapshots.is_idle(wait=True)
    if not is_finite(final):
        raise DivergedError(
            "what was learned is not finite after the last step; the last checkpoint before it is kept. Lower "
            f"--learning-rate or the weights of the loss, or set --clip-gradient, {IN_A_NEW_RUN} once that is there."
        )
    snapshots.write(folder, final)
    snapshots.remove()


def _name_of(training: Training) -> str:
    """Sorts after those of earlier steps."""
    name, steps = f"epoch{len(training.history):05}", training.steps_done()
    return f"{name}-step{steps:07}" if steps else name


def _checkpoint_of(training: Training, description: dict[str, Any]) -> Checkpoint:
    state = training.state()
    trainable = state["trainable"]
    model = {name.removeprefix(_MODEL_PREFIX): trainable[name] for name in trainable if name.startswith(_MODEL_PREFIX)}
    rest = {name: tensor for name, tensor in trainable.items() if not name.startswith(_MODEL_PREFIX)}
    return Checkpoint(model, {**state, "trainable": rest}, description)


def _state_of(kept: Checkpoint) -> dict[str, Any]:
    model = {_MODEL_PREFIX + name: tensor for name, tensor in kept.tensors.items()}
    return {**kept.state, "trainable": {**model, **kept.state["trainable"]}}
