"""Predicted epoch times: the model of the reduction, and what the README says without and with a GPU's record."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from bench.__main__ import main
from bench.harness import records
from bench.harness.records import Record, Row, Timing
from bench.training import prediction
from bench.training.prediction import Parts, gradient_bytes, predict, reduce_seconds
from bench.training.step_peers import IMAGENET

PARTS = Parts(step=0.03, backward=0.012, is_split=True, batch=256, gradient=64_000_000)


def test_the_gradient_is_that_of_student_and_translator() -> None:
    """ResNet-18 has 11,689,512 parameters; the translator 512 -> 512 -> 256 -> 256 of 3x3."""
    translator = 9 * (512 * 512 + 512 * 256 + 256 * 256) + 512 + 256 + 256
    assert gradient_bytes(IMAGENET) == 4 * (11_689_512 + translator)


def test_rings_reduce_within_and_between_nodes() -> None:
    hops = 14 * prediction.HOP_IN_NODE
    assert reduce_seconds(8, 64_000_000) == pytest.approx(2 * 7 / 8 * 64e6 / prediction.NVLINK + hops)
    between = 2 * 7 / 8 * 8e6 / prediction.NETWORK + 14 * prediction.HOP_BETWEEN
    assert reduce_seconds(64, 64_000_000) == pytest.approx(reduce_seconds(8, 64_000_000) + between)


def test_more_gpus_are_faster_and_no_more_efficient() -> None:
    lines = [predict(gpus, PARTS, overlapped=False) for gpus in prediction.GPUS]
    assert lines[0].efficiency == 1
    assert lines[0].epoch == pytest.approx(1_281_167 / 256 * 0.03)
    for fewer, more in pairwise(lines):
        assert more.epoch < fewer.epoch
        assert more.efficiency < fewer.efficiency
        assert more.efficiency == pytest.approx(0.03 / more.step)
    assert predict(8, PARTS, overlapped=True).step == PARTS.step  # shorter than backward
    slow = PARTS._replace(gradient=64_000_000_000)
    assert predict(8, slow, overlapped=True).step == pytest.approx(predict(8, slow, overlapped=False).step - 0.012)


def record(bench: str, *rows: Row) -> Record:
    hardware = {"cpu": "a processor", "device": "cuda", "gpu": {"name": "a GPU"}}
    return Record("2026-01-01", hardware, {"torch": "2"}, {"threads": 2}, list(rows))


def row(bench: str, candidate: str, work: str, median: float, **details: Any) -> Row:
    timing = Timing(median, median, median, 3, [median])
    return Row(bench, bench, candidate, work, timing, details=details)


STEP = row("distill_step", "ftfast", "step", 32.0, dims=[256, 3, 224, 224], teacher=IMAGENET.teacher)
SPLIT = {"data": 50.0, "teacher": 10.0, "student": 10.0, "backward": 20.0}
RUN = row("preset_run", "synthetic", "run", 32.0, images=256, images_per_second=8000.0, milliseconds=SPLIT)
LOADER = row("loaders", "gpu", "batch", 32.0, images=256, core_seconds_per_image=5e-4)


def test_every_line_says_whether_it_was_measured() -> None:
    newest = {found.bench: {"cuda": record(found.bench, found)} for found in (STEP, RUN, LOADER)}
    text = prediction.markdown(newest)
    lines = [line for line in text.splitlines() if line.startswith("|")][2:]
    assert len(lines) == 1 + 1 + 2 * 3
    assert lines[0] == "| 1 | measured, synthetic images | 32.0 ms | 2.67 min |  |"
    assert all(("predicted" in line) != ("measured" in line) for line in lines)
    assert lines[1] == "| 1 | predicted from its step | 32.0 ms | 2.67 min | 100 % |"
    assert "as its share was measured" in text
    assert "gpu 32.0 cores" in text  # 8 * 8,000 images at 2,000 a core
    assert "63.3 MB" in text


def test_without_a_split_backward_is_assumed_and_without_a_gpu_nothing_is_said() -> None:
    same = row("store", "live teacher", "step", 32.0, dims=[256, 3, 224, 224], teacher=IMAGENET.teacher)
    assert prediction.markdown({"store": {"cuda": record("", same)}}) == prediction.markdown(
        {"distill_step": {"cuda": record("", STEP)}}
    )
    assert "assumed to be 40% of the step" in prediction.markdown({"distill_step": {"cuda": record("", STEP)}})
    assert "not measured yet" in prediction.markdown({"distill_step": {"cpu": record("", STEP)}})
    assert "not measured yet" in prediction.markdown({})


def test_the_command_reads_records(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    records.save(record("distill_step", STEP), tmp_path / "gpu.json")
    assert main(["prediction", "--records", str(tmp_path)]) == 0
    assert "| 512 | predicted, reduced beside backward |" in capsys.readouterr().out
