"""Tries of presets: a few steps of each training on noise in the shape of the data."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from ftfast.cli import main
from ftfast.distillation.run import run
from ftfast.distillation.settings.presets import for_a_try, settings_of
from ftfast.errors import SettingsError

# tests/runs/test_presets.py has every preset with narrow networks.
LARGE = ("cifar10-wrn46-4-vgg13", "cifar100-resnet110-resnet56", "imagenet-resnet50-resnet18")
DRY = {"batch_size": 2, "methods": ("none", "ft"), "device": "cpu", "threads": 0}


@pytest.mark.slow
@pytest.mark.parametrize("name", LARGE)
def test_a_preset_of_real_widths_runs_for_two_steps_on_noise_of_its_shape(name: str, tmp_path: Path) -> None:
    own = settings_of(name)
    results = run(for_a_try(settings_of(name, **DRY), 2), tmp_path / "run")
    for field in ("teacher", "student", "rate", "paraphraser_loss", "temperature", "image_size", "nesterov"):
        assert results["settings"][field] == getattr(own, field)
    assert results["settings"]["beta"] == (list(own.beta) or results["settings"]["beta"])[:1]
    assert results["methods"]["ft"]["mean"] is not None
    assert "noise" in results["data"]["title"] or results["settings"]["loader"] == "synthetic"


def test_a_try_from_the_command_line_needs_no_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--data", "cifar10", "--teacher", "resnet8", "--student", "resnet8", "--steps", "2", "--batch-size", "2"]
    fewer = ["--teacher-channels", "2", "--student-channels", "2", "--methods", "none,ft"]
    output = ["--data-dir", str(tmp_path / "nothing"), "--output", str(tmp_path / "run"), "--json", "--device", "cpu"]
    assert main(["distill", *words, *fewer, *output]) == 0
    results = json.loads(capsys.readouterr().out)
    assert results["data"]["student_images"] == 4
    assert len(results["methods"]["ft"]["students"]) == 1


@pytest.mark.parametrize("steps", ["0", "-1", "many", "1.5"])
def test_steps_takes_a_whole_number(steps: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["distill", "--steps", steps, "--output", str(tmp_path / "run")]) == 2
    assert f"steps is '{steps}'" in capsys.readouterr().err


def test_noise_stands_in_for_data_in_memory_alone() -> None:
    with pytest.raises(SettingsError, match="take --loader synthetic"):
        replace(settings_of("images"), noise_images=100)
