"""The paper's experiments by name: their values, what overrides them, and each of them run end to end."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ftfast.cli import main
from ftfast.distillation.data import datasets
from ftfast.distillation.settings.presets import PRESETS, preset_for, settings_of
from ftfast.distillation.settings.run_settings import Settings, schedule_of
from ftfast.errors import SettingsError
from tests.training.cifar_files import write_cifar

torchvision = pytest.importorskip("torchvision")

# Fewer images and steps, and one student: a run of seconds that passes through every phase.
SHORT = {
    "teacher-epochs": "1",
    "student-epochs": "1",
    "seeds": "1",
    "methods": "none,at,ft+kd",
    "batch-size": "32",
    "paraphraser-steps": "3",
    "paraphraser-held-out": "100",
    "paraphraser-optimiser": "adam",
    "paraphraser-learning-rate": "1e-4",
    "teacher-channels": "2",
    "student-channels": "2",
    "device": "cpu",
    "dtype": "float32",
    "threads": "1",
}
PAPERS = [name for name in PRESETS if name.startswith("cifar")]


@pytest.fixture
def cifar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data folder with files in both formats of CIFAR: 200 images to train on, 100 to test."""
    for name, kind, each in (("cifar10", "CIFAR10", 40), ("cifar100", "CIFAR100", 200)):
        write_cifar(tmp_path / "data", getattr(torchvision.datasets, kind), monkeypatch, train=each, test=100)
        small = replace(datasets.DATASETS[name], train_images=200, test_images=100)
        monkeypatch.setitem(datasets.DATASETS, name, small)
    return tmp_path / "data"


@pytest.mark.parametrize("preset", [PAPERS[0], *(pytest.param(name, marks=pytest.mark.slow) for name in PAPERS[1:])])
def test_a_paper_preset_runs_from_cifar_files_to_a_report(
    preset: str, cifar: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--preset", preset, "--data-dir", str(cifar), "--output", str(tmp_path / "run")]
    words += [word for name, value in SHORT.items() for word in (f"--{name}", value)]
    assert main(["distill", *words, "--json"]) == 0, capsys.readouterr().err
    results = json.loads(capsys.readouterr().out)
    assert results["methods"].keys() == {"none", "at", "ft+kd"}
    settings = results["settings"]
    assert (settings["teacher"], settings["student"]) == (PRESETS[preset]["teacher"], PRESETS[preset]["student"])
    assert (settings["crop_padding"], settings["flip"]) == (4, True)
    assert (settings["learning_rate_schedule"], settings["milestones"]) == ("steps", [82, 123])
    assert (tmp_path / "run" / "report.md").exists()


def test_maps_of_unlike_size_are_pooled_and_compared() -> None:
    """The student of the pair whose maps differ learns from features of the teacher's that have its own size."""
    from ftfast.distillation.models.registry import Outputs, Resized, resized

    settings = settings_of("cifar10-wrn46-4-vgg13", device="cpu")
    features = torch.randn(2, 6, 8, 8)
    network = resized(lambda images: Outputs(images, features), settings.teacher_features(), settings.map_size())
    assert isinstance(network, Resized)
    expected = features.double().reshape(2, 6, 2, 4, 2, 4).mean((3, 5))
    torch.testing.assert_close(network(features).features.double(), expected, rtol=1e-5, atol=1e-9)
    student = settings.student_features()
    assert resized(network, student, settings.map_size()) is network


def test_official_values(capsys: pytest.CaptureFixture[str]) -> None:
    """As in train_student.py and train_Paraphraser.py of the authors' code."""
    assert main(["distill", "--preset", "cifar10-resnet56-resnet20", "--print-settings"]) == 0
    printed = json.loads(capsys.readouterr().out)
    expected = {
        "student_epochs": 164,
        "milestones": [82, 123],
        "gamma": 0.1,
        "learning_rate": 0.1,
        "nesterov": False,
        "weight_decay": 5e-4,
        "momentum": 0.9,
        "batch_size": 128,
        "beta": [500.0],
        "rate": 0.5,
        "paraphraser_learning_rate": 0.1,
        "paraphraser_learning_rate_schedule": "constant",
        "paraphraser_loss": "l1",
        "paraphraser_optimiser": "sgd",
        "paraphraser_steps": 2346,
        "student_images": 50_000,
    }
    assert {name: printed[name] for name in expected} == expected


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_are_whole_and_their_maps_fit(preset: str) -> None:
    without_files = {"loader": "synthetic"} if PRESETS[preset]["data"] == "images" else {}
    settings = settings_of(preset, device="cpu", **without_files).resolved()
    assert Settings.from_json(settings.to_json()) == settings
    assert settings.data == PRESETS[preset]["data"]
    if settings.data.startswith("cifar"):
        assert settings.map_size() == ((2, 2) if settings.student == "vgg13" else (8, 8))
    if settings.data == "images":
        assert (settings.classes, settings.train_images, settings.test_images) == (1000, 1_281_167, 50_000)
        assert settings.map_size() == (7, 7)
    if not settings.data.startswith(("digits", "fashion")):
        assert len(settings.weight_grid()) == 1  # the paper's weights; no student trains to choose any


def test_what_is_given_overrides_the_preset_and_nothing_else() -> None:
    name = "cifar10-wrn40-1-resnet20"
    given = settings_of(name, rate=1.0, flip=False)
    assert replace(given, rate=0.5, flip=True) == settings_of(name)


def test_data_without_a_preset_take_their_own() -> None:
    assert settings_of() == Settings()
    assert settings_of(data="cifar100") == settings_of(preset_for("cifar100"))
    assert settings_of(data="fashion-mnist").crop_padding == 2


def test_a_preset_for_other_data_is_refused() -> None:
    with pytest.raises(SettingsError, match="preset cifar10-resnet56-resnet20 is for cifar10, and data is 'digits'"):
        settings_of("cifar10-resnet56-resnet20", data="digits")
    with pytest.raises(SettingsError, match="preset is 'cifar'; it takes digits, fashion-mnist, cifar10-resnet56"):
        settings_of("cifar")


@pytest.mark.parametrize(
    ("words", "name", "value"),
    [
        (["--flip"], "flip", True),
        (["--no-flip"], "flip", False),
        (["--flip", "true"], "flip", True),
        (["--flip", "no"], "flip", False),
        (["--learning-rate-schedule", "steps", "--milestones", "3,5"], "milestones", [3, 5]),
        (["--milestones", ""], "milestones", []),
    ],
)
def test_options_of_every_kind(capsys: pytest.CaptureFixture[str], words: list[str], name: str, value: object) -> None:
    assert main(["distill", "--print-settings", *words]) == 0
    assert json.loads(capsys.readouterr().out)[name] == value


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--flip", "perhaps"], "flip is 'perhaps'; it takes yes or no"),
        (["--no-flip", "yes"], "flip is 'not yes'; it takes yes or no"),
        (["--learning-rate-schedule", "steps"], "milestones is empty; give --milestones"),
        (["--milestones", "0"], "milestones is 0; it takes a number of at least 1"),
        (["--preset", "x"], "preset is 'x'"),
    ],
)
def test_bad_options_are_one_sentence(capsys: pytest.CaptureFixture[str], words: list[str], message: str) -> None:
    assert main(["distill", "--print-settings", *words]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("preset", ["digits", "images"])
def test_adamw_has_its_own_defaults_and_what_is_given_stands(preset: str) -> None:
    plain, adamw = settings_of(preset), settings_of(preset, optimiser="adamw")
    own = {"optimiser": "adamw", "learning_rate": 1e-3, "weight_decay": 0.05, "decayed": "matrices"}
    assert adamw == replace(plain, **own)
    assert plain.optimiser == "sgd"
    assert settings_of(preset, optimiser="sgd") == plain
    assert settings_of(preset, optimiser="adamw", learning_rate=2e-4, decayed="all") == replace(
        adamw, learning_rate=2e-4, decayed="all"
    )
    schedule = schedule_of(replace(adamw, warm_up=2.0), 10)
    assert (schedule.optimiser, schedule.decay_vectors, schedule.momentum) == ("adamw", False, adamw.momentum)
    assert [schedule.rate(step, 5) for step in (0, 4, 9)] == pytest.approx([1e-3 / 11, 5e-3 / 11, 10e-3 / 11])


def test_settings_of_a_run_before_adamw_are_those_of_sgd() -> None:
    kept = settings_of("digits").to_json()
    del kept["optimiser"]
    assert Settings.from_json(kept) == settings_of("digits")
