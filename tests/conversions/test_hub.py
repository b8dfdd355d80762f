"""Checkpoints from the Hugging Face Hub and models put there, with a stand-in for its client."""

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ftfast.cli import main
from ftfast.distillation.models import registry
from ftfast.distillation.phases.paraphraser import build_paraphraser, read_paraphraser
from ftfast.distillation.phases.teacher import read_teacher
from ftfast.distillation.runtime import checkpoint
from ftfast.distillation.runtime.hub import HubError, local, pinned
from ftfast.distillation.settings.hub_teacher import with_hub_teacher
from ftfast.distillation.settings.run_settings import Settings
from ftfast.errors import SettingsError
from tests.conversions.hub_stand_in import GatedRepoError, HfHubHTTPError, Hub, LocalEntryNotFoundError, put_in_place

DESCRIPTION = {
    "kind": "student",
    "model": {"name": "resnet8", "channels": 4, "shortcut": "projection"},
    "data": "digits",
    "dtype": "float32",
    "method": "ft",
    "seed": 1,
    "accuracy": 96.984,
}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Hub:
    found = put_in_place(monkeypatch, tmp_path / "there")
    found.make("me/student")
    return found


@pytest.fixture
def student(tmp_path: Path) -> Path:
    """Of a run that is finished, as far as its record goes."""
    model = registry.build_model("resnet8", 4, in_channels=1, classes=10, shortcut="projection", seed=3)
    folder = tmp_path / "run" / "students" / "ft" / "seed1"
    checkpoint.save(folder, checkpoint.Checkpoint(model.state_dict(), {}, DESCRIPTION))
    method = {"weights": {"beta": 60.0}, "mean": 96.0, "standard_deviation": 0.5, "images_per_second": 1000.0}
    gain = {"mean": 1.25, "standard_error": 0.2, "seeds_up": 2, "seeds": 2}
    results = {
        "format": "ftfast-results",
        "version": 1,
        "settings": {"student": "resnet8", "teacher": "resnet20", "seeds": 2},
        "teacher": {"accuracy": 98.0},
        "methods": {"none": {**method, "weights": {}, "gain": None}, "ft": {**method, "gain": gain}},
    }
    (tmp_path / "run" / "results.json").write_text(json.dumps(results))
    return folder


def test_a_student_that_is_pushed_teaches_the_next_one(
    hub: Hub, student: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With its card, and by its address alone."""
    assert main(["export", str(student), "--push", "me/student"]) == 0
    assert capsys.readouterr().out == f"me/student: https://huggingface.co/me/student/commit/{0:040x}\n"
    card = hub.read("me/student", "README.md").read_text()
    head, rows = card.split("---\n")[1:3]
    metadata = {line.partition(": ")[0]: json.loads(line.partition(": ")[2]) for line in head.splitlines()}
    assert metadata["model-index"][0]["results"][0]["metrics"][0]["value"] == 96.98
    assert "| ft | beta 60 | 96.00 ± 0.50 | +1.25 ± 0.20 | 2 of 2 | 1,000 |" in rows
    assert "**96.98 %** of the 797 test images" in rows
    assert "ftfast distill --data digits --teacher hf://me/student\n" in rows
    program = torch.export.load(hub.read("me/student", "model.pt2")).module()
    given = with_hub_teacher({"teacher": "hf://me/student", "seeds": 1})
    assert given == {
        "teacher": "resnet8",
        "teacher_channels": 4,
        "shortcut": "projection",
        "teacher_checkpoint": f"hf://me/student/model.safetensors@{0:040x}",
        "seeds": 1,
    }
    settings = Settings(**given, device="cpu").resolved()
    model = registry.build_model("resnet8", 4, in_channels=1, classes=10, shortcut="projection", seed=0)
    model.load_state_dict(read_teacher(settings))
    images = torch.randn(3, 1, 8, 8)
    expected = program(images)
    assert (model.eval()(images) - expected).norm() <= 1e-5 * expected.norm()
    hub.fails = LocalEntryNotFoundError("model.safetensors")  # what is pinned is in the cache
    assert Settings(**given, device="cpu").resolved() == settings
    assert main(["distill", "--teacher", given["teacher_checkpoint"], "--print-settings", "--device", "cpu"]) == 0
    assert json.loads(capsys.readouterr().out)["teacher_checkpoint"] == given["teacher_checkpoint"]


def test_a_paraphraser_is_read_from_the_hub(hub: Hub, tmp_path: Path) -> None:
    settings = Settings(device="cpu", paraphraser_checkpoint="hf://me/student/some/where/p.safetensors@main")
    own = build_paraphraser(settings).state_dict()
    save_file({name: tensor.contiguous() for name, tensor in own.items()}, tmp_path / "p.safetensors")
    commit = hub.commit("me/student", {"some/where/p.safetensors": tmp_path / "p.safetensors"})
    settings = settings.resolved()
    assert settings.paraphraser_checkpoint == f"hf://me/student/some/where/p.safetensors@{commit}"
    hub.commit("me/student", {})
    torch.testing.assert_close(read_paraphraser(settings), own, rtol=0, atol=0)


def test_a_teacher_s_file_that_does_not_say_what_it_is_of_asks_for_its_name(hub: Hub, tmp_path: Path) -> None:
    save_file({"weight": torch.ones(1)}, tmp_path / "model.safetensors")
    hub.commit("me/student", {"model.safetensors": tmp_path / "model.safetensors"})
    with pytest.raises(SettingsError, match="give --teacher NAME --teacher-checkpoint hf://me/student"):
        with_hub_teacher({"teacher": "hf://me/student"})
    with pytest.raises(SettingsError, match="teacher_checkpoint is given too"):
        with_hub_teacher({"teacher": "hf://me/student", "teacher_checkpoint": "t.pt"})


@pytest.mark.parametrize(
    ("address", "fails", "reason"),
    [
        ("hf://me", None, "is no address on the Hub; it takes hf://owner/name[/path/to/file][@revision]."),
        ("hf://me/student@", None, "is no address on the Hub"),
        ("hf://me too/student", None, "is no address on the Hub"),
        ("hf://me/student--1", None, "is no address on the Hub"),
        ("hf://me/student//no.pt", None, "is no address on the Hub"),
        ("hf://me/student/../no.pt", None, "is no address on the Hub"),
        ("hf://you/nothing", None, "there is no such repository, or your token may not see it"),
        ("hf://me/student@v9", None, "the repository has no such revision."),
        ("hf://me/student/no.pt", None, "the repository has no such file."),
        ("hf://me/student", GatedRepoError(403), "its owner gives access to those who ask on its page"),
        ("hf://me/student", LocalEntryNotFoundError(), "the Hub cannot be reached, and the file is not in the cache."),
        ("hf://me/student", RuntimeError("no route\nmore"), "the Hub cannot be reached (no route)."),
        ("hf://me/student", HfHubHTTPError(500, "internal error."), "the Hub answers internal error."),
    ],
)
def test_what_cannot_be_had_from_the_hub_is_said_in_a_sentence(
    hub: Hub, tmp_path: Path, address: str, fails: Exception | None, reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.commit("me/student", {})
    hub.fails = fails
    assert main(["distill", "--teacher", address, "--output", str(tmp_path / "run")]) == 2
    said = capsys.readouterr().err
    assert said.startswith("ftfast distill: error: hf://")
    assert reason in said
    assert said.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("repository", "token", "fails", "reason"),
    [
        ("student", "t", None, "push is 'student'; it takes owner/name."),
        ("me too/student", "t", None, "push is 'me too/student'; it takes owner/name."),
        ("me/student", None, None, "there is no token for the Hub; run hf auth login, or set HF_TOKEN."),
        ("me/other", "t", None, "me/other: there is no such repository, or your token may not see it"),
        ("me/student", "t", HfHubHTTPError(403), "me/student: your token may not do that"),
        ("me/student", "t", ConnectionError("no route"), "me/student: the Hub cannot be reached (no route)."),
    ],
)
def test_a_push_that_cannot_be_ends_before_anything_is_exported(
    hub: Hub,
    student: Path,
    repository: str,
    token: str | None,
    fails: Exception | None,
    reason: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    hub.token, hub.fails = token, fails
    assert main(["export", str(student), str(tmp_path / "student.safetensors"), "--push", repository]) == 2
    said = capsys.readouterr().err
    assert reason in said
    assert said.count("\n") == 1
    assert not (tmp_path / "student.safetensors").exists()


def test_without_huggingface_hub_a_sentence_says_what_to_install(
    student: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    for ask in (pinned, local):
        with pytest.raises(HubError, match=r"needs the package huggingface_hub; pip install 'ftfast\[hub\]'"):
            ask("hf://me/student")
    assert main(["export", str(student), "--push", "me/student"]) == 2
    assert "pip install 'ftfast[hub]'" in capsys.readouterr().err
    assert main(["export", str(student)]) == 2
    assert "neither FILE nor --push is given" in capsys.readouterr().err
