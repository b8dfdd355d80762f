"""Whole runs, small: what they leave, that they repeat, pair by seed, keep the test images out, and resume."""

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ftfast.distillation.data import datasets, in_memory
from ftfast.distillation.data.source import Source
from ftfast.distillation.phases.report import write_report
from ftfast.distillation.phases.run_folder import check_run_folder
from ftfast.distillation.phases.setup import precision_of
from ftfast.distillation.phases.trainable import build_student
from ftfast.distillation.run import run
from ftfast.distillation.runtime import checkpoint, output_folder
from ftfast.distillation.settings.run_settings import Settings
from ftfast.distillation.training import resumable
from ftfast.distillation.training.methods import METHODS
from ftfast.errors import CheckpointError, DistillError, RunFolderError, SettingsError
from tests.processes.fork_server import Popen

SMALL = Settings(
    methods=("none", "ft", "kd"),
    seeds=2,
    teacher="resnet8",
    teacher_channels=4,
    teacher_epochs=2,
    student_channels=2,
    student_epochs=3,
    student_images=60,
    paraphraser_steps=40,
    beta=(60.0, 125.0),
    alpha=(0.5, 0.9),
    validation_folds=2,
    device="cpu",
    dtype="float32",
    threads=1,
)
SMALL_FIXED = replace(SMALL, beta=(60.0,), alpha=(0.5,))


def what_counts(results: dict[str, Any]) -> dict[str, Any]:
    """Results without what is measured of the machine."""
    measured = ("seconds", "images_per_second", "others_share", "memory")
    if isinstance(results, dict):
        return {name: what_counts(value) for name, value in results.items() if name not in measured}
    return [what_counts(value) for value in results] if isinstance(results, list) else results


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """An uninterrupted run and its results."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    results = run(SMALL, folder)
    write_report(folder, results)
    return folder, results


def test_a_run_leaves_everything_it_promises(whole: tuple[Path, dict[str, Any]]) -> None:
    folder, results = whole
    assert json.loads((folder / "results.json").read_text()) == results
    assert Settings.from_json(json.loads((folder / "settings.json").read_text())) == SMALL.resolved()
    for name in ("teacher", "paraphraser", "students/ft/seed0", "students/kd/seed1"):
        checkpoint.load(folder / name)
        assert name == "paraphraser" or list((folder / "tensorboard" / name).glob("events*"))
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (folder / "curves.svg").read_text()
    assert "](curves.png)" in (folder / "report.md").read_text()
    assert not [path for path in folder.rglob("*") if "partial" in path.name or "unfinished" in path.name]


def test_the_table_beside_the_curves_has_their_numbers(whole: tuple[Path, dict[str, Any]]) -> None:
    folder, results = whole
    rows = list(csv.DictReader((folder / "curves.csv").open()))
    assert len(rows) == len(SMALL.methods) * SMALL.student_epochs
    for name, method in results["methods"].items():
        last = [row for row in rows if row["method"] == name][-1]
        assert float(last["accuracy_mean"]) == pytest.approx(method["mean"], rel=1e-4)
        assert f"{method['mean']:.2f}" in (folder / "report.md").read_text()


def test_every_method_has_a_style_of_its_own() -> None:
    methods = METHODS.values()
    assert len({method.colour for method in methods}) == len({method.line for method in methods}) == len(methods)


def test_gains_are_paired_by_seed(whole: tuple[Path, dict[str, Any]]) -> None:
    methods = whole[1]["methods"]
    for name in ("ft", "kd"):
        pairs = zip(methods[name]["students"], methods["none"]["students"], strict=True)
        gains = [one["accuracy"] - other["accuracy"] for one, other in pairs]
        assert methods[name]["gain"]["mean"] == pytest.approx(sum(gains) / len(gains))
    assert methods["none"]["gain"] is None


def test_one_seed_starts_every_method_from_the_same_student_and_batches(
    tmp_path: Path, whole: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seen from outside: with the teacher_side' weights at 0, every method is `none`, to the last bit."""
    shutil.copytree(whole[0], tmp_path / "run")
    for part in ("students", "results.json", "selection.json"):
        path = tmp_path / "run" / part
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    neutral = replace(SMALL, beta=(0.0,), alpha=(0.0,)).resolved()
    (tmp_path / "run" / "settings.json").write_text(json.dumps(neutral.to_json()))
    run(neutral, tmp_path / "run", resume=True)
    for seed in range(SMALL.seeds):
        weights = [checkpoint.load(tmp_path / "run/students" / name / f"seed{seed}").tensors for name in SMALL.methods]
        for other in weights[1:]:
            assert all(torch.equal(tensor, other[name]) for name, tensor in weights[0].items())
    first, second = (build_student(neutral, seed).stem.weight for seed in (0, 1))
    assert not torch.equal(first, second)


def test_the_choice_of_weights_never_sees_the_test_images(
    tmp_path: Path, whole: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    digits = datasets.DATASETS["digits"]

    def spoilt(*_: object) -> tuple[in_memory.Split, in_memory.Split]:
        train, test = digits.load(Source())
        return train, in_memory.Split(torch.randn_like(test.images), 9 - test.labels)

    monkeypatch.setitem(datasets.DATASETS, "digits", replace(digits, load=spoilt))
    results = run(replace(SMALL, seeds=1), tmp_path / "run")
    assert results["teacher"]["accuracy"] != whole[1]["teacher"]["accuracy"]
    assert results["paraphraser"] == whole[1]["paraphraser"]
    for name, method in whole[1]["methods"].items():
        assert results["methods"][name]["trials"] == method["trials"]
        assert results["methods"][name]["weights"] == method["weights"]


def test_every_method_tries_equally_many_weights(whole: tuple[Path, dict[str, Any]]) -> None:
    methods = whole[1]["methods"]
    assert len(methods["ft"]["trials"]) == len(methods["kd"]["trials"]) == 2
    assert methods["none"]["trials"] == []


class Killed(Exception):
    """Stands for a kill at the point where it is raised."""


@pytest.fixture
def kill_after(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str, int], None]]:
    """Arms a kill after n checkpoints of a phase: the next one's files are written, and it is not in its place."""

    def arm(phase: str, saves: int) -> None:
        rename = os.rename
        left = [saves]

        def rename_or_die(source: str, target: str) -> None:
            left[0] -= phase in str(target)
            if left[0] < 0:
                raise Killed
            rename(source, target)

        monkeypatch.setattr(os, "rename", rename_or_die)

    yield arm
    monkeypatch.undo()


@pytest.mark.parametrize(
    ("phase", "saves"),
    [("run/teacher", 1), ("run/paraphraser", 0), ("students/none", 2), ("students/ft/seed1", 1)],
)
def test_a_killed_run_resumes_to_the_results_of_an_uninterrupted_one(
    tmp_path: Path,
    whole: tuple[Path, dict[str, Any]],
    kill_after: Callable[[str, int], None],
    monkeypatch: pytest.MonkeyPatch,
    phase: str,
    saves: int,
) -> None:
    kill_after(phase, saves)
    with pytest.raises(Killed):
        run(SMALL, tmp_path / "run", checkpoint_seconds=0)
    monkeypatch.undo()
    finished = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("seed?/model.safetensors")}
    results = run(SMALL, tmp_path / "run", resume=True)
    assert what_counts(results) == what_counts(whole[1])
    assert all(path.stat().st_mtime_ns == changed for path, changed in finished.items())


@pytest.mark.process
def test_a_run_killed_by_the_system_resumes_to_the_same_results(
    tmp_path: Path, whole: tuple[Path, dict[str, Any]]
) -> None:
    folder = tmp_path / "run"
    words = ["--output", str(folder), "--checkpoint-seconds", "0"]
    for name, value in SMALL.to_json().items():
        if name not in ("format", "version") and value is not None:
            words += [
                f"--{name.replace('_', '-')}",
                ",".join(map(str, value)) if isinstance(value, list) else str(value),
            ]
    process = Popen([sys.executable, "-m", "ftfast", "distill", *words], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 200
    while not list(folder.glob("students/ft/seed0*/epoch*")) and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (folder / "results.json").exists()
    assert what_counts(run(SMALL, folder, resume=True)) == what_counts(whole[1])


def test_a_finished_run_resumes_at_once_and_changes_no_number(
    whole: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resumable, "train_to_end", lambda *_, **__: pytest.fail("a finished training ran again"))
    results = run(SMALL, whole[0], resume=True)
    assert results == whole[1]


def test_a_folder_with_a_run_is_refused_and_left_as_it_is(whole: tuple[Path, dict[str, Any]]) -> None:
    before = {path: path.stat().st_mtime_ns for path in whole[0].rglob("*")}
    with pytest.raises(RunFolderError, match="holds a run already; continue it with --resume"):
        run(SMALL, whole[0])
    assert {path: path.stat().st_mtime_ns for path in whole[0].rglob("*")} == before


@pytest.mark.parametrize("resume", [False, True])
def test_a_folder_with_other_files_is_refused(tmp_path: Path, resume: bool) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(RunFolderError, match="other files"):
        run(SMALL, tmp_path, resume=resume)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_resuming_with_other_settings_is_refused_and_names_the_field(whole: tuple[Path, dict[str, Any]]) -> None:
    with pytest.raises(SettingsError, match="student_epochs is 4, and the run to be resumed has 3"):
        run(replace(SMALL, student_epochs=4), whole[0], resume=True)


def test_a_changed_checkpoint_of_the_run_is_refused(tmp_path: Path, whole: tuple[Path, dict[str, Any]]) -> None:
    shutil.copytree(whole[0], tmp_path / "run")
    path = tmp_path / "run/students/ft/seed0/model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DistillError, match=r"model\.safetensors is cut short or changed"):
        run(SMALL, tmp_path / "run", resume=True)


@pytest.mark.parametrize(
    ("target", "source", "message"),
    [
        (
            "students/ft/seed0",
            "teacher",
            "is not this run's student: kind is 'teacher', not 'student'; remove the folder",
        ),
        ("students/ft/seed0", "students/ft/seed1", "seed is 1, not 0"),
        ("students/kd/seed0", "students/ft/seed0", "method is 'ft', not 'kd'"),
        ("teacher", "students/ft/seed0", "is not this run's teacher: kind is 'student', not 'teacher'"),
        ("paraphraser", "teacher", "is not this run's paraphraser: kind is 'teacher'"),
        ("students/ft/seed0", "paraphraser", "is not this run's student: kind is 'paraphraser'"),
    ],
)
def test_a_checkpoint_of_something_else_is_refused(
    tmp_path: Path, whole: tuple[Path, dict[str, Any]], target: str, source: str, message: str
) -> None:
    shutil.copytree(whole[0], tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / target)
    shutil.copytree(whole[0] / source, tmp_path / "run" / target)
    with pytest.raises(CheckpointError, match=re.escape(message)):
        run(SMALL, tmp_path / "run", resume=True)


def test_an_unfinished_checkpoint_of_another_training_is_refused(
    tmp_path: Path, kill_after: Callable[[str, int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    kill_after("students/none/seed0", 2)
    with pytest.raises(Killed):
        run(SMALL_FIXED, tmp_path / "run", checkpoint_seconds=0)
    monkeypatch.undo()
    students = tmp_path / "run/students/none"
    (students / "seed0.unfinished").rename(students / "seed1.unfinished")
    with pytest.raises(CheckpointError, match="is not this run's unfinished student: seed is 0, not 1"):
        run(SMALL_FIXED, tmp_path / "run", resume=True)


@pytest.mark.parametrize(
    "change", [{"accuracy": "91"}, {"accuracy": None}, {"accuracy": float("nan")}, {"loss": True}, {"beta": 7.0}]
)
def test_changed_trials_are_refused(
    tmp_path: Path, whole: tuple[Path, dict[str, Any]], change: dict[str, object]
) -> None:
    shutil.copytree(whole[0], tmp_path / "run")
    path = tmp_path / "run/selection.json"
    trials = json.loads(path.read_text())
    trials["ft"][0].update(change)
    path.write_text(json.dumps(trials))
    with pytest.raises(RunFolderError, match=r"selection\.json is not as it was written; remove it"):
        run(SMALL, tmp_path / "run", resume=True)


def test_one_folder_has_one_writer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output_folder, "LOCK_SECONDS", 0.1)
    said: list[RunFolderError] = []

    class Rival(Exception):
        """Ends the first run when the second one has been refused."""

    def second_run(*_: object) -> None:
        with pytest.raises(RunFolderError) as refusal:
            run(SMALL, tmp_path / "run", resume=True)
        said.append(refusal.value)
        raise Rival

    with monkeypatch.context() as patched:
        patched.setattr(datasets, "load", second_run)
        with pytest.raises(Rival):
            run(SMALL, tmp_path / "run")
        with pytest.raises(Rival):  # an ended run holds nothing any more
            run(SMALL, tmp_path / "run", resume=True)
    assert all("another process is writing to it; wait for it or choose another --output" in str(one) for one in said)
    assert len(said) == 2


def test_a_folder_with_a_lock_alone_is_as_good_as_empty(tmp_path: Path) -> None:
    (tmp_path / ".lock").touch()
    check_run_folder(tmp_path, SMALL, resume=False)


@pytest.mark.parametrize("form", ["folder", "safetensors"])
def test_a_teacher_from_a_checkpoint_is_the_same_teacher(
    tmp_path: Path, whole: tuple[Path, dict[str, Any]], form: str
) -> None:
    source = whole[0] / "teacher" / ("" if form == "folder" else "model.safetensors")
    settings = replace(SMALL, teacher_checkpoint=str(source), methods=("none", "kd"), seeds=1, alpha=(0.5,))
    results = run(settings, tmp_path / "run")
    assert results["teacher"]["accuracy"] == whole[1]["teacher"]["accuracy"]
    assert results["paraphraser"] is None
    expected = whole[1]["methods"]["none"]["students"][0]["accuracy"]
    assert results["methods"]["none"]["students"][0]["accuracy"] == expected


@pytest.mark.parametrize("form", ["folder", "safetensors"])
def test_a_paraphraser_from_a_checkpoint_gives_the_same_students(
    tmp_path: Path, whole: tuple[Path, dict[str, Any]], form: str
) -> None:
    source = whole[0] / "paraphraser" / ("" if form == "folder" else "model.safetensors")
    settings = replace(
        SMALL,
        teacher_checkpoint=str(whole[0] / "teacher"),
        paraphraser_checkpoint=str(source),
        paraphraser_steps=1,
        methods=("ft",),
        seeds=1,
        beta=(whole[1]["methods"]["ft"]["weights"]["beta"],),
    )
    results = run(settings, tmp_path / "run")
    assert results["paraphraser"] == whole[1]["paraphraser"]
    expected = whole[1]["methods"]["ft"]["students"][0]["history"]
    assert [epoch["losses"] for epoch in results["methods"]["ft"]["students"][0]["history"]] == [
        epoch["losses"] for epoch in expected
    ]


def test_a_paraphraser_that_learns_nothing_stops_the_run(tmp_path: Path, whole: tuple[Path, dict[str, Any]]) -> None:
    settings = replace(
        SMALL,
        paraphraser_learning_rate=100.0,
        teacher_checkpoint=str(whole[0] / "teacher"),
        paraphraser_optimiser="sgd",
    )
    with pytest.raises(DistillError, match="lower --paraphraser-learning-rate"):
        run(settings, tmp_path / "run")
    assert not (tmp_path / "run/paraphraser").exists()


def test_precision_follows_the_settings() -> None:
    assert precision_of(replace(SMALL, dtype="bfloat16")).dtype == torch.bfloat16
    assert SMALL.resolved().dtype == "float32"
