"""The lines that a training leaves of its speed, and the clock of its parts."""

import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ftfast.distill.presets import settings_of
from ftfast.distill.run import run
from ftfast.distill.telemetry import FILE, PARTS, RunLog, StepClock, part

CPU = torch.device("cpu")


def test_one_step_in_many_is_timed_and_the_first_is_not() -> None:
    clock = StepClock(CPU, every=3)
    for _ in range(6):
        clock.begin_step()
        with part("teacher"):
            time.sleep(0.01)
        clock.end_step()
    with part("teacher"):
        time.sleep(1)  # outside of any step
    found = clock.take()
    assert list(found) == ["teacher"]
    assert 9 < found["teacher"] < 300  # the second and the fifth, their mean
    assert clock.take() == {}


class Gpu:
    """100 joules between two looks."""

    def __init__(self) -> None:
        self.spent = 0.0

    def joules(self) -> float:
        self.spent += 100
        return self.spent

    def look(self) -> dict[str, float | None]:
        return {"busy_percent": 80.0, "watts": None}

    def memory_used(self) -> int:
        return 123


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / FILE).read_text().splitlines()]


def test_a_line_has_rate_pause_and_what_the_gpu_tells(tmp_path: Path) -> None:
    training: Any = SimpleNamespace(history=[1, 2], steps_done=lambda: 7, total_steps_done=lambda: 27)
    (tmp_path / FILE).write_text('{"step": 1}\n{"step": 2')  # a kill left half a line
    with RunLog(tmp_path, "students/ft/seed0", CPU, Gpu(), seconds=0.3) as log:  # type: ignore[arg-type]
        log.step(training, 10)
        log.pause(0.01)
        time.sleep(0.31)
        log.step(training, 40)
    first, line = lines(tmp_path)
    assert first == {"step": 1}
    assert (line["training"], line["epoch"], line["step"]) == ("students/ft/seed0", 3, 7)
    seconds = 50 / line["images_per_second"]
    assert 0.31 <= seconds < 5
    assert line["seconds"] == pytest.approx(seconds)
    assert line["checkpoint_pause"] == pytest.approx(0.01 / seconds)
    assert line["checkpoints"] == 1
    assert line["gpu"] == {"busy_percent": 80.0, "memory_bytes": 123.0, "joules_per_image": 2.0}
    assert list((tmp_path / "tensorboard" / "students/ft/seed0").iterdir())


def test_a_run_splits_its_steps(tmp_path: Path) -> None:
    settings = settings_of(
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
    )
    run(settings, tmp_path / "run", telemetry_seconds=0.0)
    of_student = [line for line in lines(tmp_path / "run") if line["training"] == "students/ft/seed0"]
    assert len(of_student) == 8  # 2 epochs of 4 batches
    parts = [line["milliseconds"] for line in of_student if "milliseconds" in line]
    assert len(parts) == 1
    assert list(parts[0]) == list(PARTS)
    assert all(value > 0 for value in parts[0].values())
