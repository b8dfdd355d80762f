"""The lines that a training leaves of its speed, and the clock of its parts."""

import errno
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ftfast.distillation.monitor import step_clock, telemetry
from ftfast.distillation.monitor.epochs import Epoch
from ftfast.distillation.monitor.gpu_meter import why_there_is_none
from ftfast.distillation.monitor.step_clock import PARTS, StepClock, timed
from ftfast.distillation.monitor.telemetry import FILE, RunLog
from ftfast.distillation.monitor.trackers import DEFAULT, TrackedTraining, Trackers
from ftfast.distillation.phases.run_folder import open_run_folder
from ftfast.distillation.run import run
from ftfast.distillation.settings.presets import settings_of
from ftfast.distillation.settings.run_settings import Settings
from tests.monitor.fake_clock import FakeClock
from tests.monitor.fake_nvml import FakeNvml
from tests.processes.launching import finished, torchrun

CPU = torch.device("cpu")
WORKER = Path(__file__).with_name("telemetry_worker.py")


@pytest.fixture
def fake_time(monkeypatch: pytest.MonkeyPatch) -> FakeClock:
    clock = FakeClock()
    for module in (telemetry, step_clock):
        monkeypatch.setattr(module, "time", clock)
    return clock


def test_one_step_in_many_is_timed_and_the_first_is_not(fake_time: FakeClock) -> None:
    clock = StepClock(CPU, every=3)
    for step in range(6):
        clock.begin_step()
        with timed("teacher"):
            fake_time.sleep(0.01 * step)
        clock.end_step()
    with timed("teacher"):
        fake_time.sleep(1)  # outside of any step
    assert clock.means() == {"teacher": pytest.approx(25)}  # the second and the fifth, their mean
    clock.clear()
    assert clock.means() == {}


class Gpu:
    """100 joules between two looks."""

    def __init__(self) -> None:
        self.spent = 0.0

    def joules(self) -> float:
        self.spent += 100
        return self.spent

    def watts(self) -> None:
        return None

    def busy_percent(self) -> float:
        return 80.0

    def memory_used(self) -> int:
        return 123


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / FILE).read_text().splitlines()]


def training_at(step: int = 27, **losses: float) -> Any:
    """Seven steps into its third epoch; its losses' sums grow by these between two looks."""
    return SimpleNamespace(
        history=[1, 2],
        steps_done=lambda: 7,
        total_steps_done=lambda: step,
        take_losses=lambda: {name: torch.tensor(value) for name, value in losses.items()},
        figures=lambda: {"learning_rate": 0.1},
    )


def tracked(folder: Path, title: str, say: Callable[[str], None] = print) -> TrackedTraining:
    """A training that TensorBoard is told of."""
    trackers = Trackers((DEFAULT,), folder, say)
    trackers.begin({})
    with trackers.training(title, {}) as training:
        return training


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Step and value of all that a TensorBoard folder has to show."""
    found = EventAccumulator(str(folder)).Reload()
    return {tag: [(event.step, event.value) for event in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


def test_a_line_has_rate_pause_losses_and_what_the_gpu_tells(tmp_path: Path, fake_time: FakeClock) -> None:
    training = training_at(labels=50.0, factors=25.0)
    (tmp_path / FILE).write_text('{"step": 1}\n{"step": 2')  # a kill left half a line
    counts: dict[str, float] = {}  # nothing is counted yet
    add_step = tracked(tmp_path, "students/ft/seed0").add_step
    log = RunLog(
        tmp_path,
        "students/ft/seed0",
        CPU,
        Gpu(),  # type: ignore[arg-type]
        seconds=0.3,
        add_step=add_step,
        counts=counts,
    )
    log.step(training, 10)
    log.pause(0.01)
    fake_time.sleep(0.31)
    counts["damaged"] = 2
    log.step(training, 40)
    first, line = lines(tmp_path)
    assert first == {"step": 1}
    assert (line["training"], line["epoch"], line["step"]) == ("students/ft/seed0", 3, 7)
    assert line["images_per_second"] == pytest.approx(50 / 0.31)
    assert line["seconds"] == pytest.approx(0.31)
    assert line["checkpoint_pause"] == pytest.approx(0.01 / 0.31)
    assert line["checkpoints"] == 1
    assert line["gpu"] == {"busy_percent": 80.0, "memory_bytes": 123.0, "joules_per_image": 2.0}
    assert (line["loss"], line["losses"], line["learning_rate"]) == (1.5, {"labels": 1.0, "factors": 0.5}, 0.1)
    assert line["counts"] == {"damaged": 2}
    drawn = scalars(tmp_path / "tensorboard" / "students/ft/seed0" / "steps")
    assert drawn["steps/loss/labels"] == [(27, 1.0)]
    assert drawn["steps/loss/sum"] == [(27, 1.5)]
    assert drawn["steps/gpu/joules_per_image"] == [(27, 2.0)]
    assert drawn["steps/counts/damaged"] == [(27, 2.0)]
    assert "steps/learning_rate" in drawn


def test_losses_that_are_not_finite_leave_lines_that_are_json(tmp_path: Path) -> None:
    log = RunLog(tmp_path, "teacher", CPU, None, seconds=0.0)
    log.step(training_at(labels=10.0, factors=float("inf")), 10)
    (line,) = lines(tmp_path)
    assert line["losses"] == {"labels": 1.0}
    assert "loss" not in line


def test_what_is_between_two_epochs_is_no_time_and_no_energy_of_the_training(
    tmp_path: Path, fake_time: FakeClock
) -> None:
    gpu = Gpu()
    log = RunLog(tmp_path, "teacher", CPU, gpu, seconds=0.1)  # type: ignore[arg-type]
    training = training_at(labels=1.0)
    log.begin_epoch()
    fake_time.sleep(0.04)
    log.step(training, 10)
    log.end_epoch(training)
    fake_time.sleep(0.5)  # the evaluation
    gpu.spent += 1000
    log.begin_epoch()
    log.step(training, 10)
    assert not (tmp_path / FILE).exists()
    fake_time.sleep(0.07)
    log.step(training, 20)
    (line,) = lines(tmp_path)
    assert line["seconds"] == pytest.approx(0.11)
    assert line["gpu"]["joules_per_image"] == 200 / 40
    assert line["loss"] == 2.0 / 40  # of both epochs


def digits_run(**changes: Any) -> Settings:
    return settings_of(
        methods=("ft",),
        seeds=1,
        beta=(60.0,),
        teacher="resnet8",
        teacher_channels=4,
        teacher_epochs=1,
        student_channels=2,
        student_epochs=2,
        student_images=100,
        paraphraser_steps=20,
        device="cpu",
        **changes,
    )


def test_a_run_splits_its_steps_and_loses_nothing_of_its_logs(tmp_path: Path) -> None:
    run(digits_run(), tmp_path / "run", telemetry_seconds=0.0)
    of_student = [line for line in lines(tmp_path / "run") if line["training"] == "students/ft/seed0"]
    assert len(of_student) == 8  # 2 epochs of 4 batches
    parts = [line["milliseconds"] for line in of_student if "milliseconds" in line]
    assert len(parts) == 1
    assert list(parts[0]) == list(PARTS)
    assert all(value > 0 for value in parts[0].values())
    assert set(of_student[0]["losses"]) == {"labels", "factors"}
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    history = results["methods"]["ft"]["students"][0]["history"]
    for epoch in history:
        own = [line["loss"] for line in of_student if line["epoch"] == epoch["epoch"]]
        assert fmean(own) == pytest.approx(sum(epoch["losses"].values()), rel=1e-5)  # batches of one size
    assert of_student[-1]["learning_rate"] < of_student[0]["learning_rate"]
    logs = tmp_path / "run" / "tensorboard" / "students/ft/seed0"
    assert [step for step, _ in scalars(logs)["accuracy/test"]] == [1, 2]
    assert [step for step, _ in scalars(logs / "steps")["steps/images_per_second"]] == list(range(1, 9))


def epoch(number: int) -> Epoch:
    return Epoch(number, {"labels": 2.0}, 50.0, 100, 1.0, 80.0)


def test_a_resumed_training_replaces_what_came_later_and_nothing_else(tmp_path: Path) -> None:
    for first_epoch, first_step in ((1, 1), (3, 21)):  # the second one goes on after two epochs of ten steps
        teacher = tracked(tmp_path, "teacher")
        log = RunLog(tmp_path, "teacher", CPU, None, 0.0, add_step=teacher.add_step)
        for number in range(first_epoch, first_epoch + 3):
            start = first_step + 10 * (number - first_epoch)
            for step in range(start, start + 10):
                log.step(training_at(step, labels=float(first_step)), 1)
            teacher.add_epoch(epoch(number), start + 9)
    drawn = scalars(tmp_path / "tensorboard" / "teacher")
    assert [step for step, _ in drawn["accuracy/test"]] == [1, 2, 3, 4, 5]
    assert drawn["accuracy/test top 5"][0] == (1, 80.0)
    of_steps = scalars(tmp_path / "tensorboard" / "teacher" / "steps")["steps/loss/labels"]
    assert of_steps == [(step, 1.0 if step < 21 else 21.0) for step in range(1, 51)]


def test_a_disk_that_fills_costs_lines_and_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once there is room again lines go on, and none is half there."""
    said: list[str] = []
    add_step = tracked(tmp_path, "teacher", said.append).add_step
    log = RunLog(tmp_path, "teacher", CPU, None, 0.0, say=said.append, add_step=add_step)
    log.step(training_at(1), 1)
    whole = os.write

    def half(handle: int, content: Any) -> int:
        if len(content) < 20:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return whole(handle, content[: len(content) // 2])

    with monkeypatch.context() as full:
        full.setattr(os, "write", half)
        log.step(training_at(2), 1)
        log.step(training_at(3), 1)
    log.step(training_at(4), 1)
    assert len(lines(tmp_path)) == 2
    assert [step for step, _ in scalars(tmp_path / "tensorboard/teacher/steps")["steps/images_per_second"]] == [1, 4]
    assert said == [
        f"warning: {path} cannot be written: No space left on device; the run goes on without it"
        for path in (tmp_path / FILE, tmp_path / "tensorboard")
    ]


def test_a_run_ends_well_without_room_for_its_telemetry(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, settings = tmp_path / "run", digits_run().resolved()
    with open_run_folder(folder, settings, resume=False):
        (folder / FILE).symlink_to("/dev/full")
        (tmp_path / "no folder").touch()
        (folder / "tensorboard").symlink_to(tmp_path / "no folder")
    results = run(settings, folder, resume=True, telemetry_seconds=0.0)
    assert results["methods"]["ft"]["mean"] > 0
    said = capsys.readouterr().err
    assert said.count("cannot be written") == 2
    assert f"warning: {folder / FILE} cannot be written: No space left on device; the run goes on without it\n" in said
    assert f"warning: {folder / 'tensorboard'} cannot be written: " in said
    assert "Traceback" not in said


@pytest.mark.process
def test_the_energy_of_all_gpus_is_that_of_all_images(tmp_path: Path) -> None:
    """Two processes, of which the second has the hungrier GPU and takes longer until the gradients meet."""
    process = torchrun(2, str(WORKER), str(tmp_path))
    status, _, errors = finished(process)
    assert status == 0, errors
    found = lines(tmp_path)
    assert len(found) >= 3
    for line in found[1:]:
        assert line["gpu"]["watts"] == 400
        # The counters are renewed twenty times between two lines.
        assert line["gpu"]["joules_per_image"] * line["images_per_second"] == pytest.approx(400, rel=0.06)
        assert line["gpu"]["memory_bytes"] == 3 * 2**30
        assert (line["gpu"]["busy_percent"], line["gpu"]["lowest_busy_percent"]) == (70, 40)
        assert line["counts"] == {"damaged": 3, "of the second": 5}
        assert line["loss"] == pytest.approx(2.0)  # each process has its half of the sum
    slowest = [line["slowest_process"] for line in found if "slowest_process" in line]
    assert slowest
    assert all(one["rank"] == 1 and one["milliseconds"] > 1.2 * one["mean_milliseconds"] for one in slowest)
    assert scalars(tmp_path / "tensorboard" / "teacher" / "steps")["steps/gpu/watts"][-1][1] == 400


@pytest.mark.parametrize("missing", [False, True])
def test_a_gpu_without_figures_is_told_of(monkeypatch: pytest.MonkeyPatch, missing: bool) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None if missing else FakeNvml())
    assert why_there_is_none(CPU) is None
    said = why_there_is_none(torch.device("cuda"))
    assert said is not None
    assert ("pip install 'ftfast[distill]'" in said) == missing
