"""``ftfast export`` and ``ftfast evaluate``: a trained model by itself, and what it is worth."""

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from ftfast.cli import main
from ftfast.commands import export
from ftfast.commands.evaluate import evaluate_checkpoint
from ftfast.commands.export import export_checkpoint
from ftfast.distillation.data import datasets
from ftfast.distillation.models import registry
from ftfast.distillation.monitor.plots import confusion_counts
from ftfast.distillation.runtime import checkpoint
from ftfast.errors import DistillError

DESCRIPTION = {
    "kind": "student",
    "model": {"name": "resnet8", "channels": 4, "shortcut": "projection"},
    "data": "digits",
    "dtype": "float32",
}


@pytest.fixture
def trained(tmp_path: Path) -> tuple[Path, torch.nn.Module]:
    model = registry.build_model("resnet8", 4, in_channels=1, classes=10, shortcut="projection", seed=3)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.uniform_(-1, 1)
            module.running_var.uniform_(0.5, 2)
    folder = tmp_path / "student"
    checkpoint.save(folder, checkpoint.Checkpoint(model.state_dict(), {}, DESCRIPTION))
    return folder, model.eval()


def test_an_exported_program_gives_the_model_s_logits_for_any_batch(
    trained: tuple[Path, torch.nn.Module], tmp_path: Path
) -> None:
    folder, model = trained
    found = export_checkpoint(folder, tmp_path / "student.pt2")
    program = torch.export.load(tmp_path / "student.pt2").module()
    for samples in (1, 3, 10):
        images = torch.randn(samples, 1, 8, 8)
        expected = model(images)
        assert (program(images) - expected).norm() <= 1e-5 * expected.norm()
    assert found["parameters"] == sum(parameter.numel() for parameter in model.parameters())


def test_an_exported_onnx_file_gives_the_model_s_logits_for_any_batch(
    trained: tuple[Path, torch.nn.Module], tmp_path: Path
) -> None:
    onnx = pytest.importorskip("onnx", reason="an .onnx file needs ftfast[onnx]")
    pytest.importorskip("onnxscript", reason="an .onnx file needs ftfast[onnx]")
    from onnx.reference import ReferenceEvaluator

    folder, model = trained
    path = tmp_path / "student.onnx"
    assert export_checkpoint(folder, path)["bytes"] == path.stat().st_size
    content = onnx.load(path)
    assert json.loads({entry.key: entry.value for entry in content.metadata_props}["ftfast"])["data"] == "digits"
    for samples in (1, 3):
        images = torch.randn(samples, 1, 8, 8)
        expected = model(images)
        (logits,) = ReferenceEvaluator(content).run(["logits"], {"images": images.numpy()})
        assert (torch.from_numpy(logits) - expected).norm() <= 1e-5 * expected.norm()


def test_an_onnx_file_without_its_packages_is_refused(
    trained: tuple[Path, torch.nn.Module], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(DistillError, match=r"needs the package onnx; pip install 'ftfast\[onnx\]'\.$"):
        export_checkpoint(trained[0], tmp_path / "student.onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["student"]


def test_exported_tensors_are_the_model_s_and_say_what_they_are(
    trained: tuple[Path, torch.nn.Module], tmp_path: Path
) -> None:
    folder, model = trained
    path = tmp_path / "student.safetensors"
    export_checkpoint(folder, path)
    tensors = load_file(path)
    assert tensors.keys() == model.state_dict().keys()
    assert all(torch.equal(tensors[name], tensor) for name, tensor in model.state_dict().items())
    with safe_open(path, "pt") as file:
        assert json.loads(file.metadata()["ftfast"])["model"] == DESCRIPTION["model"]


def test_an_existing_file_is_kept_unless_asked(trained: tuple[Path, torch.nn.Module], tmp_path: Path) -> None:
    path = tmp_path / "student.safetensors"
    path.write_text("mine")
    with pytest.raises(DistillError, match="--overwrite"):
        export_checkpoint(trained[0], path)
    assert path.read_text() == "mine"
    export_checkpoint(trained[0], path, overwrite=True)
    assert load_file(path)


def test_another_suffix_is_refused(trained: tuple[Path, torch.nn.Module], tmp_path: Path) -> None:
    with pytest.raises(DistillError, match=r"\.safetensors, \.pt2, \.onnx"):
        export_checkpoint(trained[0], tmp_path / "student.h5")
    assert [path.name for path in tmp_path.iterdir()] == ["student"]


def test_a_folder_is_made_and_one_that_cannot_be_is_told_of_in_a_sentence(
    trained: tuple[Path, torch.nn.Module], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """For a program both ended with torch's traceback."""
    words = ["export", str(trained[0])]
    assert main([*words, str(tmp_path / "new" / "student.pt2")]) == 0
    capsys.readouterr()
    assert main([*words, "/proc/student.pt2"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("ftfast export: error: /proc/")
    assert said.count("\n") == 1


def test_a_wrong_export_leaves_no_file(
    trained: tuple[Path, torch.nn.Module], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(export._WRITERS, ".safetensors", lambda *_: torch.zeros(2, 10))
    with pytest.raises(DistillError, match="off by"):
        export_checkpoint(trained[0], tmp_path / "student.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["student"]


def test_evaluation_counts_what_the_logits_say(trained: tuple[Path, torch.nn.Module]) -> None:
    folder, model = trained
    found = evaluate_checkpoint(folder, device="cpu")
    _, test = datasets.load("digits", torch.device("cpu"))
    with torch.no_grad():
        logits = model(test.images)
    five = logits.topk(5, dim=1).indices
    assert found["accuracy"] == pytest.approx(100 * (five[:, 0] == test.labels).double().mean().item())
    assert found["top5_accuracy"] == pytest.approx(100 * (five == test.labels[:, None]).any(1).double().mean().item())
    counts = torch.tensor(found["confusion"])
    assert counts.sum() == len(test)
    assert torch.equal(counts.sum(1), test.labels.bincount(minlength=10))
    assert counts.diagonal().sum() == round(found["accuracy"] * len(test) / 100)


def test_confusion_has_true_classes_as_rows() -> None:
    assert confusion_counts(torch.tensor([1, 1, 0]), torch.tensor([0, 0, 2]), 3) == [[0, 2, 0], [0, 0, 0], [1, 0, 0]]


def test_the_commands(
    trained: tuple[Path, torch.nn.Module], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", str(trained[0]), "--device", "cpu", "--confusion", str(tmp_path / "c.png")]) == 0
    assert "top 5" in capsys.readouterr().out
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")
    assert main(["evaluate", str(trained[0]), "--device", "cpu", "--confusion", "c.txt"]) == 2
    assert ".png or .svg" in capsys.readouterr().err
    assert main(["export", str(trained[0]), str(tmp_path / "student.pt2"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["error"] <= 1e-5
