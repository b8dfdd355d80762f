"""What a run says of its pace: images a second, the time left, and lines for epochs that take long."""

import signal
from io import StringIO
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import nn

from ftfast.distill.data.in_memory import Split
from ftfast.distill.monitor import progress as saying
from ftfast.distill.monitor.epochs import Epoch
from ftfast.distill.monitor.progress import Pace, Progress, duration, epoch_line
from ftfast.distill.run import run
from ftfast.distill.runtime.signals import Interrupted
from ftfast.distill.settings.presets import settings_of
from ftfast.distill.training.evaluate import evaluate
from ftfast.distill.training.step import Precision

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


def drive(pace: Pace, clock: Clock, *, epochs: int, steps: int, step: float, evaluation: float) -> None:
    """Epochs of so many steps of 256 images."""
    for _ in range(epochs):
        for _ in range(steps):
            clock.seconds += step
            pace.add(256)
        clock.seconds += evaluation
        pace.end_epoch()


def test_epochs_of_minutes_have_a_rate_and_a_time_left_within_the_first() -> None:
    clock = Clock()
    pace = Pace(clock)
    assert pace.images_per_second() is None
    assert pace.seconds_left(100) is None
    clock.seconds += 100  # torch.compile
    pace.add(256)
    for _ in range(3):  # steps of 40 s, which a window of half a minute has none of
        clock.seconds += 40
        pace.add(256)
    assert pace.images_per_second() == pytest.approx(6.4)
    assert pace.seconds_left(640) == pytest.approx(100)


def test_the_time_left_has_the_evaluations_in_it_and_the_rate_has_not() -> None:
    clock = Clock()
    pace = Pace(clock)
    drive(pace, clock, epochs=20, steps=5000, step=0.064, evaluation=80)  # of 400 s, and 4,000 images/s
    clock.seconds += 0.064
    pace.add(256)
    clock.seconds += 0.064
    pace.add(256)
    assert pace.images_per_second() == pytest.approx(4000)
    assert pace.seconds_left(70 * 5000 * 256) == pytest.approx(70 * 400, rel=0.01)


def test_the_time_left_follows_a_training_that_slows_down() -> None:
    clock = Clock()
    pace = Pace(clock)
    drive(pace, clock, epochs=200, steps=100, step=0.1, evaluation=0)
    drive(pace, clock, epochs=100, steps=100, step=0.2, evaluation=0)
    assert pace.seconds_left(100 * 256) == pytest.approx(20, rel=0.01)
    assert len(pace._epochs) < 100


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(34.6, "35 s"), (600, "10 min"), (27_600, "7 h 40 min"), (3590, "1 h 0 min"), (190_000, "2 d 5 h")],
)
def test_durations_in_words(seconds: float, words: str) -> None:
    assert duration(seconds) == words


def test_an_epochs_line_has_losses_accuracies_rate_and_time_left() -> None:
    record = Epoch(3, {"labels": 3.2, "factors": 1.9}, 45.678, 4000, 2.0, 70.0)
    assert epoch_line("students/ft/seed0", 90, record, 27_600) == (
        "students/ft/seed0, epoch 3 of 90: loss 5.1 (labels 3.2, factors 1.9), 45.68 % (top 5: 70.00 %) of the test "
        "images, 2,000 images/s, about 7 h 40 min left"
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
        left.append(progress._left)
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
