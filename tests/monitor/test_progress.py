"""What a run says of its pace: images a second, the time left, and lines for epochs that take long."""

import signal
from io import StringIO
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import nn

from ftfast.distillation.data.in_memory import Split
from ftfast.distillation.monitor import progress as saying
from ftfast.distillation.monitor.epochs import Epoch
from ftfast.distillation.monitor.progress import Progress, epoch_line
from ftfast.distillation.run import run
from ftfast.distillation.runtime.signals import Interrupted
from ftfast.distillation.settings.presets import settings_of
from ftfast.distillation.training.evaluate import evaluate
from ftfast.distillation.training.step.step import Precision

STUDENT_IMAGES, STUDENT_EPOCHS, SEEDS = 100, 3, 2
SETTINGS = settings_of(
    methods=("none",),
    seeds=SEEDS,
    teacher="resnet8",
    teacher_channels=4,
    teacher_epochs=1,
    student_channels=2,
    student_epochs=STUDENT_EPOCHS,
    student_images=STUDENT_IMAGES,
    batch_size=32,
    device="cpu",
)


class Clock:
    """Stands still until it is told."""

    def __init__(self) -> None:
        self.seconds = 1000.0

    def __call__(self) -> float:
        return self.seconds


@pytest.mark.parametrize(("steps", "step"), [(4, 40.0), (500, 0.1)], ids=["of 40 s", "of 0.1 s"])
def test_a_phase_has_rate_and_time_left_in_its_first_epoch_and_skipped_images_have_no_part_in_them(
    monkeypatch: pytest.MonkeyPatch, steps: int, step: float
) -> None:
    """Steps of 40 s, of which rich's own half a minute has none, showed neither."""
    clock = Clock()
    progress = Progress(10_000_000, Console(file=StringIO()))
    monkeypatch.setattr(progress._bars, "get_time", clock)
    progress.begin("students of ft", 1_256_000)
    progress.skip(1_000_000)
    clock.seconds += 100  # torch.compile
    progress.advance(256)
    for _ in range(steps):
        clock.seconds += step
        progress.advance(256)
    task = progress._task(progress._phase)
    assert task.speed == pytest.approx(256 / step)
    assert task.time_remaining == pytest.approx(progress.images_left() * step / 256, abs=1)
    assert progress.images_left() == 256_000 - 256 * (steps + 1)


def test_a_bar_is_one_line_on_a_terminal_of_40_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Images a second took a second line below each bar."""
    clock, written = Clock(), StringIO()
    progress = Progress(1000, Console(file=written, width=40))
    monkeypatch.setattr(progress._bars, "get_time", clock)
    progress.begin("students of ft+kd", 500)
    for _ in range(3):
        clock.seconds += 0.1
        progress.advance(50)
    progress.console.print(progress._bars.get_renderable())
    assert len(written.getvalue().splitlines()) == 2


def test_an_epochs_line_has_losses_accuracies_rate_and_time_left() -> None:
    record = Epoch(3, {"labels": 3.2, "factors": 1.9}, 45.678, 4000, 2.0, 70.0)
    assert epoch_line("students/ft/seed0", 90, record, 27_600.0) == (
        "students/ft/seed0, epoch 3 of 90: loss 5.1 (labels 3.2, factors 1.9), 45.68 % (top 5: 70.00 %) of the test "
        "images, 2,000 images/s, about 7:40:00 left"
    )
    record = Epoch(90, {"labels": 3.2}, None, 4000, 2.0)
    assert epoch_line("paraphraser", 90, record, 0.0) == "paraphraser, epoch 90 of 90: loss 3.2, 2,000 images/s"


def test_short_epochs_are_silent_until_nothing_was_said_for_a_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(saying.time, "monotonic", clock)
    written = StringIO()
    with Progress(1000, Console(file=written, soft_wrap=True)) as progress:
        progress.begin("students of ft", 1000)
        for number in range(1, 16):
            progress.advance(50)
            clock.seconds += 9
            progress.end_epoch("students/ft/seed0", 20, Epoch(number, {"labels": 1.0}, 50.0, 50, 9.0))
        progress.end_epoch("students/ft/seed0", 20, Epoch(16, {"labels": 1.0}, 50.0, 50, 10.0))
    assert [line.split(":")[0].split()[-3] for line in written.getvalue().splitlines()] == ["7", "14", "16"]


def test_a_line_is_said_once() -> None:
    written = StringIO()
    progress = Progress(1, Console(file=written))
    for _ in range(2):
        progress.say_once("warning: no room")
    assert written.getvalue() == "warning: no room\n"


def test_a_run_without_a_terminal_says_a_line_a_long_epoch(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(saying, "LONG_EPOCH_SECONDS", 0.0)
    run(SETTINGS, tmp_path / "run")
    said = capsys.readouterr().err
    lines = [line for line in said.splitlines() if ", epoch " in line]
    assert [line.split(":")[0] for line in lines] == [
        "teacher, epoch 1 of 1",
        *(f"students/none/seed{seed}, epoch {number} of 3" for seed in range(SEEDS) for number in (1, 2, 3)),
    ]
    assert all(" % of the test images, " in line and " images/s" in line for line in lines)
    assert [line for line in lines if "left" not in line] == [lines[0], lines[-1]]
    assert "\r" not in said
    assert "\x1b" not in said


def test_bars_advance_step_by_step_and_a_resumed_run_takes_up_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    advanced: list[int] = []
    left: list[int] = []
    advance, end = Progress.advance, Progress.end

    def watched(progress: Progress, images: int) -> None:
        advanced.append(images)
        advance(progress, images)
        if len(left) == 1 and advanced[-10:] == [25] * 10:  # batches of one size, two of the third epoch
            signal.raise_signal(signal.SIGTERM)

    def ended(progress: Progress) -> None:
        left.append(progress.images_left())
        end(progress)

    monkeypatch.setattr(Progress, "advance", watched)
    monkeypatch.setattr(Progress, "end", ended)
    with pytest.raises(Interrupted):
        run(SETTINGS, tmp_path / "run")
    monkeypatch.setattr(signal, "raise_signal", lambda _: None)
    before = sum(advanced[-10:])
    advanced.clear()
    run(SETTINGS, tmp_path / "run", resume=True)
    assert sum(advanced) == SEEDS * STUDENT_EPOCHS * STUDENT_IMAGES - before
    assert left[-1] == 0  # of the students' phase


class Guess(nn.Module):
    """Takes class 3 for the likeliest and then those after it."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.classes = classes

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        order = (torch.arange(self.classes) - 3) % self.classes
        return -order.float().expand(len(images), -1)


@pytest.mark.parametrize(("classes", "top5"), [(99, None), (100, 50.0)])
def test_the_likeliest_five_count_where_there_are_many_classes(classes: int, top5: float | None) -> None:
    images = Split(torch.zeros(4, 1, 2, 2), torch.tensor([3, 7, 8, 2]))
    judged = evaluate(Guess(classes), images, Precision(torch.device("cpu"), torch.float32))
    assert judged.accuracy == 25.0
    assert judged.top5_accuracy == top5
