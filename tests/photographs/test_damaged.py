"""Damaged photographs are counted over all processes and epochs, and bounded by what all of them found."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ftfast.distillation.data.photographs import streamed
from ftfast.distillation.runtime.processes import ALONE
from ftfast.distillation.runtime.signals import Stopped
from ftfast.distillation.training.loop import Training
from ftfast.distillation.training.schedule import Schedule
from tests.photographs import damaged_worker
from tests.photographs.photograph_folder import make_folder
from tests.processes.launching import ROOT, torchrun

WORKER = ROOT / "tests" / "photographs" / "damaged_worker.py"
DAMAGED, TESTED = 8, 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of 60 photographs to train on 8 are damaged, of 20 to test on 3."""
    folder = tmp_path_factory.mktemp("photographs")
    make_folder(folder, classes=4, train=60, val=20)
    for part, count in (("train", DAMAGED), ("val", TESTED)):
        for file in sorted(folder.glob(f"{part}/*/*"))[::2][:count]:
            file.write_text("no picture")
    return folder


def of_processes(ranks: int, folder: Path, output: Path, workers: int) -> list[dict[str, Any]]:
    run = torchrun(ranks, str(WORKER), str(folder), str(output), str(workers))
    _, errors = run.communicate(timeout=120)
    assert run.returncode == 0, errors
    return [json.loads((output / f"rank{rank}.json").read_text()) for rank in range(ranks)]


@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_keeps_how_many_were_damaged(folder: Path, workers: int) -> None:
    found = damaged_worker.train(folder, workers, ALONE)
    assert found["damaged"] == [DAMAGED, DAMAGED]
    totals = [line for line in found["said"] if line.endswith("others stand in")]
    expected = [f"warning: {count} photographs cannot be decoded; others stand in" for count in ("8 of 60", "3 of 20")]
    assert totals == 2 * expected


@pytest.mark.slow
def test_two_processes_sum_what_they_found(folder: Path, tmp_path: Path) -> None:
    found = of_processes(2, folder, tmp_path, 2)
    assert [each["damaged"] for each in found] == [[DAMAGED, DAMAGED]] * 2
    assert "warning: 8 of 60 photographs cannot be decoded; others stand in" in found[0]["said"]
    assert "warning: 3 of 20 photographs cannot be decoded; others stand in" in found[0]["said"]


@pytest.mark.slow
def test_two_processes_together_bear_no_more_than_one(folder: Path, tmp_path: Path) -> None:
    """Each finds ten at most, which are borne with, and both together more."""
    worse = tmp_path / "worse"
    shutil.copytree(folder, worse)
    for file in sorted(worse.glob("train/*/*"))[1::2][:6]:
        file.write_text("no picture")
    found = of_processes(2, worse, tmp_path, 0)
    expected = "14 of 60 photographs cannot be decoded, more than 1%: check the files in --data-dir."
    assert [each["refused"] for each in found] == [expected] * 2


def test_an_epoch_that_goes_on_counts_what_was_damaged_before(tmp_path: Path) -> None:
    make_folder(tmp_path, classes=4, train=60, val=20)
    for file in sorted(tmp_path.glob("train/*/*"))[::7]:
        file.write_text("no picture")

    def training() -> Training:
        images, _ = streamed.load(
            tmp_path, "folder", torch.device("cpu"), image_size=8, workers=0, rand_augment=0, classes=4,
            train_images=60, test_images=20,
        )  # fmt: skip
        model = nn.Sequential(nn.Flatten(), nn.Linear(192, 4))
        return Training(
            nn.ModuleDict({"model": model}),
            lambda batch, labels: {"labels": nn.functional.cross_entropy(model(batch), labels)},
            images,
            Schedule(1, 10, 0.05, 0.9, 0.0),
            damaged_worker.FLOAT32,
            seed=5,
        )

    expected = training().run()[0].damaged
    assert expected == 9
    begun, resumed = training(), training()
    with pytest.raises(Stopped):
        begun.run(stop=lambda: begun.steps_done() == 4)
    state = begun.state()
    assert 0 < state["epoch_under_way"]["damaged"] < expected
    resumed.load_state(state)
    assert resumed.run()[0].damaged == expected
