"""A rate is that of a training alone: what other processes took of the cores is known, and leaves the rate out."""

import subprocess
import sys
import time
from collections.abc import Iterator
from io import StringIO
from typing import Any

import pytest
from rich.console import Console

from ftfast.distillation.monitor import processor_time
from ftfast.distillation.monitor.epochs import Epoch, images_per_second, others_share
from ftfast.distillation.monitor.processor_time import EpochClock, ProcessorTime
from ftfast.distillation.phases.report import print_table, to_markdown
from ftfast.distillation.phases.results import collect, student_result
from ftfast.distillation.runtime.checkpoint import Checkpoint
from ftfast.distillation.settings.presets import settings_of
from ftfast.distillation.training.terms import Weights


def spent(machine: str, busy: float | None, own: float, cores: int = 2) -> ProcessorTime:
    return ProcessorTime(machine, cores, 10.0, busy, own)


@pytest.mark.parametrize(
    ("of_processes", "share"),
    [
        ([spent("a", 12.0, 8.0)], 0.2),
        ([spent("a", 12.0, 5.0), spent("a", 12.0, 3.0)], 0.2),  # two of one run are no others to each other
        ([spent("a", 12.0, 8.0), spent("b", 15.0, 6.0)], 0.45),  # the machine where it is most
        ([spent("a", 12.0, 8.0), spent("b", None, 6.0)], None),
    ],
)
def test_what_is_not_ours_is_others(of_processes: list[ProcessorTime], share: float | None) -> None:
    assert processor_time.others_share(of_processes) == (None if share is None else pytest.approx(share))


@pytest.fixture
def busy() -> Iterator[subprocess.Popen[bytes]]:
    """Another process, which takes a core."""
    with subprocess.Popen([sys.executable, "-S", "-c", "while True: pass"]) as process:
        yield process
        process.kill()


@pytest.mark.skipif(processor_time._busy_seconds() is None, reason="the system keeps no /proc/stat")
def test_a_busy_process_is_another_unless_it_loads_our_images(
    busy: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    begin = ProcessorTime.now()
    time.sleep(0.3)
    found = ProcessorTime.now().since(begin)
    share = processor_time.others_share([found])
    assert share is not None
    assert share > 0.05
    monkeypatch.setattr(processor_time.multiprocessing, "active_children", lambda: [busy])
    assert ProcessorTime.now().since(begin).own > found.own + 0.05


def test_an_epoch_that_goes_on_from_a_checkpoint_keeps_its_time_and_its_share(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before, a kill within an epoch lost the seconds up to the checkpoint, and the epoch looked the faster for it."""
    moments = iter([spent("a", 0.0, 0.0)._replace(at=0.0), spent("a", 12.0, 8.0)] * 2)
    monkeypatch.setattr(ProcessorTime, "now", lambda: next(moments))
    first = EpochClock()
    first.start()
    at_checkpoint = first.read()
    assert at_checkpoint == (10.0, pytest.approx(0.2))
    second = EpochClock(seconds=at_checkpoint[0], share=0.6)
    second.start()
    second.stop()
    assert second.read() == (20.0, pytest.approx(0.4))
    assert EpochClock(seconds=10.0, share=None).read() == (10.0, None)


def results_with(shares: tuple[float, ...]) -> dict[str, Any]:
    students = []
    for seed, share in enumerate(shares):
        history = [Epoch(number, {}, 50.0, 600, 0.5, others_share=share) for number in (1, 2, 3)]
        students.append(student_result(seed, history))
    settings = settings_of(methods=("none",), seeds=len(shares), student_images=60, device="cpu").resolved()
    teacher = Checkpoint({}, {"history": []}, {"accuracy": 90.0})
    return collect(settings, teacher, None, {"none": []}, {"none": (Weights(), students)}, 1.0)


def told(results: dict[str, Any]) -> str:
    console = Console(file=StringIO(), width=100)
    print_table(results, console)
    assert isinstance(console.file, StringIO)
    return console.file.getvalue()


def test_a_report_has_no_rate_of_a_training_beside_other_processes() -> None:
    quiet, one_beside, all_beside = results_with((0.0, 0.01)), results_with((0.0, 0.4)), results_with((0.2, 0.4))
    for shown in (told, to_markdown):
        assert "1,200" in shown(quiet)
        assert "processors" not in shown(quiet)
        assert "1,200" in shown(one_beside)
        assert "1 of 2 students" in " ".join(shown(one_beside).split())
        assert "1,200" not in shown(all_beside)
        assert "up to 40% of the processors' time" in " ".join(shown(all_beside).split())


def test_a_first_epoch_and_what_is_not_known_have_no_say() -> None:
    history = [Epoch(1, {}, 50.0, 600, 9.0, others_share=0.9), Epoch(2, {}, 50.0, 600, 0.5, others_share=-0.001)]
    assert others_share(history) == 0.0
    assert images_per_second(history) == 1200.0
    assert others_share([Epoch(1, {}, 50.0, 600, 9.0), Epoch(2, {}, 50.0, 600, 9.0)]) is None
