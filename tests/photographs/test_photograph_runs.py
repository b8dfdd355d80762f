"""Photographs end to end: real files, real decoding, one process and two, a process killed in mid-epoch."""

import json
import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

from ftfast.cli import main
from tests.photographs.photograph_folder import make_folder, make_shards
from tests.processes.launching import finished, python, results_of, torchrun, wait_for, workers_of

CLASSES, TRAIN, TEST = 20, 240, 60
EPOCHS = 4
RECIPE = [
    *("distill", "--data", "images", "--image-size", "32", "--workers", "1", "--methods", "ft", "--seeds", "1"),
    *("--teacher", "resnet8", "--teacher-channels", "8", "--teacher-epochs", "3", "--student", "resnet8"),
    *("--student-channels", "8", "--student-epochs", str(EPOCHS), "--batch-size", "24", "--paraphraser-epochs", "2"),
    *("--paraphraser-batch-size", "24", "--paraphraser-held-out", "40", "--beta", "60", "--device", "cpu"),
    *("--dtype", "float32", "--learning-rate-schedule", "cosine", "--paraphraser-optimiser", "adam"),
    *("--paraphraser-learning-rate", "3e-3", "--threads", "1"),
]


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """JPEG files of 20 classes, and the same in shards."""
    home = tmp_path_factory.mktemp("photographs")
    make_folder(home / "folder", classes=CLASSES, train=TRAIN, val=TEST)
    make_shards(home / "folder", home / "webdataset", images_per_shard=50)
    return home


def command(photographs: Path, loader: str, output: Path, *rest: str) -> list[str]:
    return [*RECIPE, "--data-dir", str(photographs / loader), "--loader", loader, "--output", str(output), *rest]


def student_of(folder: Path) -> dict[str, Any]:
    return results_of(folder)["methods"]["ft"]["students"][0]


@pytest.mark.slow
@pytest.mark.parametrize("loader", ["folder", "webdataset"])
def test_a_run_of_two_processes_survives_a_kill_in_mid_epoch(tmp_path: Path, photographs: Path, loader: str) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    status, _, errors = finished(torchrun(2, "-m", "ftfast", *command(photographs, loader, whole)))
    assert status == 0, errors
    process = torchrun(
        2,
        *("-m", "ftfast", *command(photographs, loader, killed, "--resume", "--checkpoint-seconds", "0")),
        restarts=2,
    )
    wait_for_mid_epoch(killed / "students" / "ft" / "seed0.unfinished", process)
    os.kill(workers_of(process.pid)[1], signal.SIGKILL)
    status, _, errors = finished(process)
    assert status == 0, errors
    histories = [student_of(folder)["history"] for folder in (whole, killed)]
    assert len(histories[0]) == EPOCHS
    for epoch, other in zip(*histories, strict=True):
        assert epoch["accuracy"] == other["accuracy"]
        for name, value in epoch["losses"].items():
            assert other["losses"][name] == pytest.approx(value, rel=1e-5)


def wait_for_mid_epoch(folder: Path, process: "subprocess.Popen[str]") -> None:
    """Until a checkpoint lies there that was written between two epochs' ends."""
    wait_for(folder, process)
    while not any("-step" in entry.name for entry in folder.iterdir() if folder.exists()):
        assert process.poll() is None, process.communicate()


@pytest.mark.slow
def test_one_process_learns_from_photographs_and_is_evaluated(tmp_path: Path, photographs: Path) -> None:
    output = tmp_path / "run"
    done = python("-m", "ftfast", *command(photographs, "folder", output))
    assert done.returncode == 0, done.stderr
    results = results_of(output)
    assert results["data"]["teacher_images"] == TRAIN
    assert results["data"]["test_images"] == TEST
    assert results["teacher"]["accuracy"] > 3 * 100 / CLASSES  # three times what guessing reaches
    assert student_of(output)["accuracy"] > 2 * 100 / CLASSES
    asked = ["evaluate", str(output / "students" / "ft" / "seed0"), "--data-dir", str(photographs / "folder")]
    evaluated = python("-m", "ftfast", *asked)
    assert evaluated.returncode == 0, evaluated.stderr
    assert f"{student_of(output)['accuracy']:.2f} %" in evaluated.stdout
    assert f"of {TEST} test images" in evaluated.stdout


def test_one_process_goes_through_shards_with_damaged_photographs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / os.fsdecode(b"caf\xe9")  # what is no UTF-8 goes through settings, records and messages
    make_folder(data / "folder", classes=4, train=60, val=16)
    for file in sorted((data / "folder" / "train").rglob("*.jpeg"))[:3]:
        file.write_bytes(file.read_bytes()[:200])
    make_shards(data / "folder", data / "shards", images_per_shard=25)
    shards = ["--data-dir", str(data / "shards"), "--loader", "webdataset"]
    smaller = [*("--teacher-epochs", "1", "--student-epochs", "2", "--paraphraser-held-out", "8", "--image-size", "24")]
    words = [*RECIPE, *smaller, *("--teacher-channels", "4", "--paraphraser-epochs", "6"), *shards]
    assert main([*words, "--output", str(tmp_path / "run")]) == 0
    results, said = results_of(tmp_path / "run"), capsys.readouterr().err
    assert (results["data"]["teacher_images"], results["data"]["damaged_images"]) == (60, 3)
    assert [epoch["damaged"] for epoch in student_of(tmp_path / "run")["history"]] == [3, 3]
    assert "warning: 3 of 60 photographs cannot be decoded; others stand in" in said
    assert main(["evaluate", str(tmp_path / "run" / "students" / "ft" / "seed0"), "--json", *shards]) == 0
    evaluated = json.loads(capsys.readouterr().out)
    assert (evaluated["test_images"], evaluated["damaged_images"]) == (16, 0)
    assert evaluated["accuracy"] == student_of(tmp_path / "run")["accuracy"]
