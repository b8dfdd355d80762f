"""Several processes train as one does on the joined batch, and end together."""

import json
import os
import signal
import subprocess
from pathlib import Path

import pytest
import torch

from ftfast.commands.evaluate import evaluate_checkpoint
from ftfast.distillation.data.images import size_of, steps_of
from ftfast.distillation.runtime.processes import ALONE, Agreement, Part
from ftfast.errors import SettingsError
from tests.processes import data_parallel_worker
from tests.processes.launching import finished, results_of, torchrun, wait_for, workers_of

ROOT = Path(__file__).parents[2]
WORKER = ROOT / "tests" / "processes" / "data_parallel_worker.py"
TINY = [
    *("distill", "--data", "digits", "--methods", "ft", "--seeds", "1", "--teacher", "resnet8"),
    *("--teacher-channels", "4", "--teacher-epochs", "1", "--student-channels", "2", "--student-epochs", "3"),
    *("--student-images", "60", "--paraphraser-steps", "20", "--beta", "60", "--device", "cpu", "--dtype", "float32"),
]


@pytest.mark.parametrize(("count", "parts"), [(10, 3), (7, 7), (3, 4), (64, 8)])
def test_parts_are_those_of_tensor_split(count: int, parts: int) -> None:
    pieces = torch.arange(count).tensor_split(parts)
    assert [len(piece) for piece in pieces] == [size_of(count, parts, place) for place in range(parts)]
    assert steps_of(count, parts) == len(range(0, count, parts))


def test_one_process_agrees_with_itself_at_once() -> None:
    assert Agreement(ALONE)(True, False) == (True, False)
    assert ALONE.on_first(lambda: 3) == 3
    assert ALONE.part == Part(0, 1)


# 30 images in batches of 12 are 3 batches of 10, which 4 processes share as 3, 3, 2 and 2.
# Steps that a GPU replays have their gradients in one tensor.
@pytest.mark.parametrize(
    ("processes", "accumulate", "words"),
    [
        (2, 1, ()),
        pytest.param(4, 2, (), marks=pytest.mark.slow),
        pytest.param(4, 2, ("replayed",), marks=pytest.mark.slow),
    ],
)
def test_many_processes_learn_what_one_learns_from_the_joined_batch(
    tmp_path: Path, processes: int, accumulate: int, words: tuple[str, ...]
) -> None:
    count, batch_size = 30, 12
    expected = data_parallel_worker.train(1, count, batch_size)
    run = torchrun(processes, str(WORKER), str(tmp_path), str(accumulate), str(count), str(batch_size), *words)
    _, errors = run.communicate(timeout=120)
    assert run.returncode == 0, errors
    found = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(processes)]
    for name, tensor in expected.items():
        assert all(torch.equal(other[name], found[0][name]) for other in found), name
        error = float((found[0][name].double() - tensor.double()).norm() / tensor.double().norm())
        assert error < 2e-6, (name, error)


@pytest.mark.process
def test_two_processes_distil_and_one_speaks(tmp_path: Path) -> None:
    words = ["-m", "ftfast", *TINY, "--output", str(tmp_path / "run"), "--json"]
    status, out, errors = finished(torchrun(2, *words, start=subprocess.Popen))  # by new interpreters
    assert status == 0, errors
    assert json.loads(out) == results_of(tmp_path / "run")
    assert errors.count("paraphraser: explains") == 1
    assert results_of(tmp_path / "run")["hardware"]["processes"] == 2


@pytest.mark.parametrize("average", [pytest.param((), marks=pytest.mark.slow), ("--ema", "0.6")], ids=["last", "ema"])
@pytest.mark.process
def test_the_recorded_accuracy_is_that_of_the_weights_that_are_kept(tmp_path: Path, average: tuple[str, ...]) -> None:
    """Each process's batch norms have seen other images, and only the first one's are kept."""
    # Rates so high that the running statistics of two processes differ.
    noisy = ["--methods", "none", "--batch-size", "4", "--learning-rate", "0.3", *average]
    status, _, errors = finished(torchrun(2, "-m", "ftfast", *TINY, *noisy, "--output", str(tmp_path / "run")))
    assert status == 0, errors
    for folder, recorded in (
        (tmp_path / "run" / "teacher", results_of(tmp_path / "run")["teacher"]["accuracy"]),
        (tmp_path / "run" / "students" / "none" / "seed0", results_of(tmp_path / "run")["methods"]["none"]["students"]),
    ):
        wanted = recorded if isinstance(recorded, float) else recorded[0]["accuracy"]
        assert evaluate_checkpoint(folder, device="cpu")["accuracy"] == pytest.approx(wanted)


@pytest.mark.process
def test_a_refusal_is_said_once_and_ends_all(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine.txt").write_text("mine")
    status, out, errors = finished(torchrun(2, "-m", "ftfast", *TINY, "--output", str(tmp_path / "run")))
    assert status != 0
    assert out == ""
    assert errors.count("holds other files; choose another --output.") == 1
    assert "ftfast/distillation" not in errors  # no traceback but torchrun's own


@pytest.mark.process
def test_a_batch_too_small_for_the_processes_is_refused(tmp_path: Path) -> None:
    command = [*TINY, "--batch-size", "3", "--output", str(tmp_path / "run")]
    _, _, errors = finished(torchrun(2, "-m", "ftfast", *command))
    assert "batch_size is 3, which 2 processes share; it takes at least 4" in errors
    assert not (tmp_path / "run").exists()


@pytest.mark.slow  # a first process that is killed: tests/processes/test_launches.py
def test_a_killed_process_is_started_again_and_the_run_ends_as_it_would_have(tmp_path: Path) -> None:
    longer = [*TINY, "--student-epochs", "40"]
    whole = finished(torchrun(2, "-m", "ftfast", *longer, "--output", str(tmp_path / "whole")))
    assert whole[0] == 0, whole[2]
    folder = tmp_path / "run"
    process = torchrun(
        2, "-m", "ftfast", *longer, "--output", str(folder), "--checkpoint-seconds", "0", "--resume", restarts=3
    )
    wait_for(folder / "students" / "ft" / "seed0.unfinished", process)
    os.kill(workers_of(process.pid)[1], signal.SIGKILL)
    status, _, errors = finished(process)
    assert status == 0, errors
    histories = [results_of(tmp_path / name)["methods"]["ft"]["students"][0]["history"] for name in ("whole", "run")]
    for epoch, other in zip(*histories, strict=True):
        assert epoch["accuracy"] == other["accuracy"]
        for name, value in epoch["losses"].items():
            assert other["losses"][name] == pytest.approx(value, rel=1e-6)


def test_more_workers_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from ftfast.distillation.runtime.processes import joined

    for name, value in {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(SettingsError, match="there are 1 GPUs"), joined("cuda"):
        pass
