"""Who is told of a run, and of what: the libraries are stand-ins that keep it."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import ftfast
from ftfast.cli import main
from ftfast.distillation.monitor.epochs import Epoch
from ftfast.distillation.monitor.trackers import FILE, Trackers, tracker_names
from ftfast.distillation.run import run
from ftfast.errors import RunFolderError, SettingsError
from tests.monitor.recording_trackers import Recording, put_in_place
from tests.monitor.test_telemetry import digits_run, scalars

ALL = "tensorboard,wandb,trackio,mlflow"


@pytest.fixture
def libraries(monkeypatch: pytest.MonkeyPatch) -> dict[str, Recording]:
    for name in ("WANDB_PROJECT", "TRACKIO_PROJECT", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.delenv(name, raising=False)
    return put_in_place(monkeypatch)


def epoch(number: int) -> Epoch:
    return Epoch(number, {"labels": 2.0}, 50.0, 100, 1.0, 80.0)


def names_kept(folder: Path) -> str:
    return str(json.loads((folder / FILE).read_text())["name"])


def texts(folder: Path) -> dict[str, str]:
    """The Markdown that a TensorBoard folder has to show."""
    found = EventAccumulator(str(folder)).Reload()
    return {name: found.Tensors(name)[0].tensor_proto.string_val[0].decode() for name in found.Tags()["tensors"]}


def test_every_tracker_is_told_the_same_of_a_run(
    tmp_path: Path, libraries: dict[str, Recording], capsys: pytest.CaptureFixture[str]
) -> None:
    """Settings, each training's figures at their steps, the table; and nothing of theirs goes to standard output."""
    folder = tmp_path / "my run+"
    run(digits_run(), folder, telemetry_seconds=0.0, track=ALL)
    name = names_kept(folder)
    assert name.startswith("my-run--")
    trainings = [f"{name}/teacher", f"{name}/students/ft/seed0"]
    for kept in libraries.values():
        assert set(kept.settings) == {name, *trainings}
        assert {title: str(kept.settings[title]["student_epochs"]) for title in trainings} == dict.fromkeys(
            trainings, "2"
        )
        assert [ended for ended in kept.ended if ended[0] != name] == [(title, True) for title in trainings]
        assert kept.ended[-1] == (name, True)
        for title in trainings:
            own = folder / "tensorboard" / title.removeprefix(f"{name}/")
            of_steps = scalars(own / "steps")
            of_epochs = scalars(own)
            told: dict[str, list[tuple[int, float]]] = {}
            for step, values in kept.runs[title]:
                for key, value in values.items():
                    told.setdefault(key, []).append((step, value))
            steps_of_epochs = [step for step, _ in told.pop("epoch")]
            assert set(told) == set(of_steps) | set(of_epochs)
            for key, points in {**of_steps, **of_epochs}.items():
                steps = [step for step, _ in points] if key in of_steps else steps_of_epochs
                assert told[key] == [
                    (step, pytest.approx(value)) for step, (_, value) in zip(steps, points, strict=True)
                ]
        assert [step for step, values in kept.runs[trainings[1]] if "epoch" in values] == [4, 8]
        assert "beta 60" in str(kept.tables[name])
    assert libraries["mlflow"].parents == {name: "", **dict.fromkeys(trainings, name)}
    shown = texts(folder / "tensorboard/run")
    assert "| student_epochs | 2 |" in shown["settings"]
    assert "beta 60" in shown["results"]
    assert "said by a library" not in capsys.readouterr().out


def told_of(folder: Path, names: str, epochs: range, *, is_whole: bool = True, said: list[str] | None = None) -> None:
    """These epochs of ten steps, of which each tells twice."""
    trackers = Trackers(tracker_names(names), folder, [].append if said is None else said.append)
    trackers.begin({"beta": 60})
    try:
        with trackers.training("teacher", {"seed": 1}) as training:
            for number in epochs:
                for step in (10 * number - 5, 10 * number):
                    training.add_step({"loss/sum": float(step)}, step, 10 * epochs[0] - 5)
                training.add_epoch(epoch(number), 10 * number)
            if not is_whole:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        return
    trackers.finish(("method",), [("ft",)], {"accuracy/ft": 50.0})


def test_a_resumed_run_is_the_same_one_to_its_trackers_and_no_step_is_told_twice(
    tmp_path: Path, libraries: dict[str, Recording]
) -> None:
    """It goes on from a checkpoint that lies before what the trackers were told last."""
    told_of(tmp_path, ALL, range(1, 4), is_whole=False)
    name = names_kept(tmp_path)
    told_of(tmp_path, ALL, range(2, 6))
    assert names_kept(tmp_path) == name
    for kept in libraries.values():
        assert set(kept.settings) == {name, f"{name}/teacher"}
        of_epochs = [step for step, values in kept.runs[f"{name}/teacher"] if "epoch" in values]
        of_steps = [step for step, values in kept.runs[f"{name}/teacher"] if "steps/loss/sum" in values]
        assert of_epochs == [10, 20, 30, 40, 50]
        assert of_steps == list(range(5, 51, 5))
    assert [step for step, _ in scalars(tmp_path / "tensorboard/teacher")["accuracy/test"]] == [1, 2, 3, 4, 5]
    first, resumed = (
        [(name, False), (f"{name}/teacher", False)],
        [(name, False), (f"{name}/teacher", True), (name, True)],
    )
    assert libraries["mlflow"].ended == first + resumed


def test_a_tracker_that_fails_in_mid_run_costs_one_sentence(tmp_path: Path, libraries: dict[str, Recording]) -> None:
    libraries["trackio"].fails_from = 3
    said: list[str] = []
    told_of(tmp_path, ALL, range(1, 4), said=said)
    assert said == ["warning: trackio is told nothing more, since it fails: no route to the host"]
    teacher = f"{names_kept(tmp_path)}/teacher"
    assert [len(kept.runs[teacher]) for kept in libraries.values()] == [9, 2, 9]
    assert names_kept(tmp_path) in libraries["wandb"].tables


def test_trackers_that_are_absent_or_unknown_end_a_run_before_it_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.delitem(sys.modules, "trackio", raising=False)
    for track, reason in (
        ("tensorboard,trackio", "trackio is not installed; pip install trackio, or 'ftfast[track]'."),
        ("tensorbored", "it takes some of tensorboard, wandb, trackio, mlflow, each once."),
        ("mlflow,mlflow", "each once."),
    ):
        assert main(["distill", "--output", str(tmp_path / "run"), "--track", track]) == 2
        said = capsys.readouterr().err
        assert said.startswith(f"ftfast distill: error: track is '{track}'")
        assert said.endswith(f"{reason}\n")
        assert said.count("\n") == 1
    assert not (tmp_path / "run").exists()
    assert tracker_names("") == ()


def test_a_tracker_that_takes_nothing_is_told_of_before_anything_is_computed(
    tmp_path: Path, libraries: dict[str, Recording], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(**_: Any) -> None:
        raise RuntimeError("no API key configured. Use wandb login.\nMore")

    monkeypatch.setattr(sys.modules["wandb"], "init", refuse)
    trackers = Trackers(("wandb",), tmp_path)
    with pytest.raises(SettingsError, match=r"track has wandb, which .*: no API key configured. Use wandb login; mend"):
        trackers.begin({})
    for damaged in ('{"name": "x y"', '{"name": "x"}'):
        (tmp_path / FILE).write_text(damaged)
        with pytest.raises(RunFolderError, match="is not as it was written"):
            trackers.begin({})


def test_a_student_of_ones_own_is_tracked_too(tmp_path: Path, libraries: dict[str, Recording]) -> None:
    import torch

    def model(width: int) -> torch.nn.Module:
        return torch.nn.Sequential(
            torch.nn.Conv2d(1, width, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(width * 36, 3)
        )

    batches = [(torch.randn(6, 1, 8, 8), torch.tensor([0, 1, 2, 0, 1, 2]))]
    layers = {"teacher_layer": "1", "student_layer": "1"}
    options: dict[str, Any] = {"epochs": 2, "device": "cpu", "progress": False, "method": "none", **layers}
    ftfast.distill(model(4), model(2), batches, batches, output=tmp_path / "run", track="trackio", **options)
    name = names_kept(tmp_path / "run")
    kept = libraries["trackio"]
    assert [step for step, values in kept.runs[f"{name}/student"] if "accuracy/test" in values] == [1, 2]
    assert kept.settings[f"{name}/student"]["epochs"] == 2
    assert kept.tables[name][0] == ["method", "accuracy", "loss"]
    assert not (tmp_path / "run" / "tensorboard").exists()
    with pytest.raises(SettingsError, match="track is 'trackio' and output is None"):
        ftfast.distill(model(4), model(2), batches, track="trackio", **options)
