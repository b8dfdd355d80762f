"""A training that is asked to stop, or has to, keeps what it has learned: at a step, in an evaluation, at its end."""

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ftfast.distillation.data.images import Images
from ftfast.distillation.runtime import checkpoint
from ftfast.distillation.runtime.checkpoint import Checkpoint
from ftfast.distillation.runtime.processes import ALONE, Agreement, Part, Processes
from ftfast.distillation.runtime.signals import Interrupted, Stopped, StopRequest, signals_interrupt
from ftfast.distillation.training import resumable
from ftfast.distillation.training.evaluate import Accuracies, evaluate
from ftfast.distillation.training.loop import Training
from ftfast.errors import DataError
from tests.processes.launching import ROOT
from tests.training.test_student_step import FLOAT32, split_of, training, weights

DESCRIPTION = {"kind": "student"}


def judged(before: Callable[[int], None] = lambda _: None) -> Training:
    """A training with an evaluation after every epoch, of several batches, before which ``before`` is called."""
    made = training()
    split = split_of()
    asked = 0

    def judge(stop: Callable[[], bool]) -> Accuracies:
        def stop_or_not() -> bool:
            nonlocal asked
            before(asked)
            asked += 1
            return stop()

        return evaluate(made.trainable["model"], Many(split), FLOAT32, stop=stop_or_not)  # type: ignore[index]

    made._evaluation = judge
    return made


def signalled(*, at: int, times: int = 1) -> Training:
    """A training that gets SIGTERM in a step, the first one being 0."""
    made = training()
    terms, calls = made._step._terms, iter(range(100))

    def with_signal(images: torch.Tensor, labels: torch.Tensor) -> Any:
        if next(calls) == at:
            for _ in range(times):
                signal.raise_signal(signal.SIGTERM)
        return terms(images, labels)

    made._step._terms = with_signal
    return made


class Many:
    """The same images, tested on in batches of ten."""

    test_batch_size = 10
    test_steps = Images.test_steps

    def __init__(self, split: Any) -> None:
        self._split = split
        self.in_order, self.damaged, self.check_damage_limit = split.in_order, split.damaged, split.check_damage_limit

    def __len__(self) -> int:
        return len(self._split)


def finish(made: Training, folder: Path, **rest: Any) -> None:
    resumable.train_to_end(made, folder, DESCRIPTION, checkpoint_seconds=1e9, **rest)


def kept(folder: Path) -> list[str]:
    return sorted(entry.name for entry in resumable.unfinished_folder(folder).iterdir())


def test_two_signals_in_a_moment_are_one_wish(tmp_path: Path) -> None:
    """Slurm signals every process of a job and torchrun passes its own on: the second one skipped the save."""
    disturbed = signalled(at=1, times=2)
    with pytest.raises(Interrupted) as caught:
        finish(disturbed, tmp_path / "student")
    assert caught.value.status == 143
    assert kept(tmp_path / "student") == ["epoch00000-step0000002"]


def test_the_repetition_of_a_signal_ends_no_process_that_is_about_to_end() -> None:
    with suppress(Interrupted), signals_interrupt():
        signal.raise_signal(signal.SIGUSR1)
    signal.raise_signal(signal.SIGUSR1)  # whose action by default is to kill
    signal.signal(signal.SIGUSR1, signal.SIG_DFL)


def test_a_signal_in_an_evaluation_is_met_there_and_the_training_goes_on_bit_equal(tmp_path: Path) -> None:
    whole = judged()
    finish(whole, tmp_path / "whole")
    batches: list[int] = []

    def interrupted(asked: int) -> None:
        batches.append(asked)
        if asked == 6:
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(Interrupted):
        finish(judged(interrupted), tmp_path / "student")
    assert batches[-1] == 6  # of five in each of three evaluations
    assert kept(tmp_path / "student") == ["epoch00001-step0000006"]
    resumed = judged()
    finish(resumed, tmp_path / "student")
    for name, tensor in weights(whole).items():
        assert torch.equal(weights(resumed)[name], tensor), name
    for epoch, other in zip(whole.history, resumed.history, strict=True):
        assert (epoch.losses, epoch.accuracy, epoch.images) == (other.losses, other.accuracy, other.images)


def test_a_signal_in_the_last_epochs_evaluation_costs_no_finished_step(tmp_path: Path) -> None:
    def interrupted(asked: int) -> None:
        if asked == 14:
            signal.raise_signal(signal.SIGUSR1)

    with pytest.raises(Interrupted) as caught:
        finish(judged(interrupted), tmp_path / "student")
    assert caught.value.status == 138
    assert kept(tmp_path / "student") == ["epoch00002-step0000006"]
    steps = 0

    def count(_: Training) -> None:
        nonlocal steps
        steps += 1

    resumed = judged()
    finish(resumed, tmp_path / "student", after_epoch=count)
    assert steps == 1
    assert (tmp_path / "student").is_dir()


def test_every_process_is_asked_equally_often_in_an_evaluation() -> None:
    class InThrees(Many):
        test_batch_size = 3

    class Joined(Processes):
        def sum(self, values: torch.Tensor) -> torch.Tensor:
            return values

        def take_from_first(self, tensors: Any) -> None:
            pass

    split = split_of(20)
    model = training().trainable["model"]  # type: ignore[index]
    asked: list[int] = []
    for rank in range(3):
        asked.append(0)

        def stop() -> bool:
            asked[-1] += 1
            return False

        evaluate(model, InThrees(split), FLOAT32, Joined(Part(rank, 3)), stop)  # type: ignore[arg-type]
    assert asked == [3, 3, 3]  # seven images, seven and six


def test_a_number_travels_in_an_agreement() -> None:
    alone = Agreement(ALONE)
    assert alone(int(signal.SIGUSR1), True) == (10, True)
    assert alone.settle(0, False) == (0, False)


def test_a_checkpoint_that_many_processes_agree_on_in_an_evaluation_is_written_after_the_next_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where an epoch has one step, each wish is heard while the epoch is judged."""

    class Later(Agreement):
        """As among many processes: what is asked is heard at the next call."""

        asked: tuple[int, ...] = (0, 0)

        def __call__(self, *wishes: int) -> tuple[int, ...]:
            heard, self.asked = self.asked, wishes
            return heard

    monkeypatch.setattr(resumable, "Agreement", Later)
    saved: list[int] = []
    made = judged()
    made._schedule = replace(made._schedule, batch_size=43)
    made._steps_per_epoch = 1
    resumable.train_to_end(
        made, tmp_path / "student", DESCRIPTION, checkpoint_seconds=0, paused=lambda _: saved.append(len(made.history))
    )
    assert saved == [1]  # of three epochs: the third one's wish would come after the end


class FullDisk:
    """Has room for so many checkpoints, wherever they lie."""

    def __init__(self, room: int, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
        self.room, self._folder, self._write = room, folder, checkpoint.save
        monkeypatch.setattr(checkpoint, "save", self._save)

    def _save(self, folder: Path, found: Checkpoint) -> None:
        if len(list(self._folder.rglob("model.safetensors"))) >= self.room:
            raise OSError(errno.ENOSPC, "No space left on device", str(folder))
        self._write(folder, found)


def test_the_result_takes_the_room_of_older_checkpoints_on_a_full_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = FullDisk(100, monkeypatch, tmp_path)

    def fill(made: Training) -> None:
        if len(made.history) == 3:
            disk.room = len(kept(tmp_path / "student"))

    resumable.train_to_end(training(), tmp_path / "student", DESCRIPTION, checkpoint_seconds=0, after_epoch=fill)
    assert disk.room == 3
    checkpoint.load(tmp_path / "student")


def test_a_save_that_fails_at_a_signal_is_told_of_though_a_warning_was_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    FullDisk(1, monkeypatch, tmp_path)
    said: list[str] = []
    with pytest.raises(Interrupted):
        resumable.train_to_end(
            signalled(at=4), tmp_path / "student", DESCRIPTION, checkpoint_seconds=0, say=said.append
        )
    first, last = said
    assert "epoch00000-step0000002 cannot be written" in first
    assert "epoch00000-step0000005 cannot be written: No space left on device; epoch00000-step0000001 stands" in last


@pytest.mark.parametrize("in_step", [False, True])
def test_images_that_fail_cost_no_step_that_was_whole(tmp_path: Path, in_step: bool) -> None:
    """torch tells of a lost reader wherever the training then is: in the middle of a step its state is of none."""
    disturbed = training()
    split, add, calls = split_of(), disturbed._losses.add, iter(range(100))
    lost = RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed.")

    class Failing:
        def __getattr__(self, name: str) -> Any:
            return getattr(split, name)

        def __len__(self) -> int:
            return len(split)

        def draw(self, *args: Any, **options: Any) -> Any:
            for number, batch in enumerate(split.draw(*args, **options)):
                if number == 4 and not in_step:
                    raise lost
                yield batch

    def interrupted(*record: Any) -> None:
        if next(calls) == 4 and in_step:
            raise lost
        add(*record)

    disturbed._images = Failing()  # type: ignore[assignment]
    disturbed._losses.add = interrupted  # type: ignore[method-assign]
    with pytest.raises(DataError, match="a reading process is gone"):
        finish(disturbed, tmp_path / "student")
    folder = resumable.unfinished_folder(tmp_path / "student")
    assert [path.name for path in folder.glob("*")] == ([] if in_step else ["epoch00000-step0000004"])


LAUNCHER = """
import os, subprocess, sys
worker = subprocess.Popen([sys.executable, "-c", sys.argv[1]], env={**os.environ, "TORCHELASTIC_RUN_ID": "x"})
sys.stdin.read()
os._exit(0)
"""
WORKER = """
import os, time
from ftfast.distillation.runtime.signals import Interrupted, signals_interrupt
try:
    with signals_interrupt():
        print("there", flush=True)
        time.sleep(60)
except Interrupted as interruption:
    print(interruption.status, flush=True)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="Linux tells a process of its parent's end")
def test_a_process_whose_torchrun_is_gone_is_interrupted() -> None:
    launcher = subprocess.Popen(
        [sys.executable, "-c", LAUNCHER, WORKER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert launcher.stdout is not None
    assert launcher.stdout.readline() == "there\n"
    launcher.kill()
    assert launcher.stdout.read() == "143\n"
    launcher.wait()


def test_a_stop_request_begins_anew_after_one_that_was_met() -> None:
    for _ in range(2):
        with pytest.raises(Interrupted), StopRequest():
            signal.raise_signal(signal.SIGTERM)


def test_stopped_is_what_an_evaluation_says() -> None:
    with pytest.raises(Stopped):
        evaluate(training().trainable["model"], split_of(), FLOAT32, stop=lambda: True)  # type: ignore[index]
