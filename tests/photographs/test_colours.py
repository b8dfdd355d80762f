"""Photographs are normalised as the networks' weights were trained, in every command that reads a run."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from ftfast.cli import main
from ftfast.commands.trained import read_trained
from ftfast.distillation.data.images import Images
from ftfast.distillation.data.photographs import listing, streamed
from ftfast.distillation.data.photographs.decoding import IMAGENET, Colours
from ftfast.distillation.data.photographs.streamed import Streamed
from ftfast.distillation.models import libraries
from ftfast.distillation.runtime.seeds import seeded
from ftfast.distillation.settings.presets import settings_of
from ftfast.distillation.settings.run_settings import Settings
from ftfast.distillation.store import header
from ftfast.distillation.training.evaluate import evaluate
from ftfast.distillation.training.step.step import Precision
from ftfast.errors import SettingsError
from tests.photographs.photograph_folder import make_folder, make_shards
from tests.photographs.test_streamed import on_device
from tests.processes.launching import results_of

CPU = torch.device("cpu")
FLOAT32 = Precision(CPU, torch.float32)
HALVES = Colours((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
TEACHER, OTHER = "timm/test_resnet", "timm/test_efficientnet"  # timm's numbers for them: halves, and ImageNet's
CLASSES, SIDE = 4, 32


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photographs")
    make_folder(folder, classes=CLASSES, train=40, val=16)
    return folder


def resolved(**given: Any) -> Settings:
    chosen: dict[str, Any] = {
        "loader": "synthetic",
        "image_size": SIDE,
        "device": "cpu",
        "pretrained": False,
        "resize_features": True,
    }
    return settings_of("images", **{**chosen, **given}).resolved()


def colours_of(settings: Settings) -> Colours:
    return Colours(settings.mean, settings.deviation)


def test_libraries_say_what_their_weights_were_trained_with() -> None:
    assert libraries.pretrained_colours(TEACHER) == HALVES
    assert libraries.pretrained_colours(OTHER) == IMAGENET
    assert libraries.pretrained_colours("torchvision/resnet18") == IMAGENET
    assert libraries.pretrained_colours("resnet20") is None


def test_trained_weights_decide_and_what_is_given_decides_over_them() -> None:
    assert colours_of(resolved(teacher=TEACHER, student="torchvision/resnet18", pretrained=True)) == HALVES
    assert colours_of(resolved(teacher=TEACHER, student="torchvision/resnet18")) == IMAGENET
    assert colours_of(resolved(teacher="resnet8", student=TEACHER, student_pretrained=True)) == HALVES
    given = Colours((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    unlike: dict[str, Any] = {"teacher": TEACHER, "student": OTHER, "pretrained": True, "student_pretrained": True}
    assert colours_of(resolved(**unlike, **given._asdict())) == given
    with pytest.raises(SettingsError, match=r"0\.5,0\.5,0\.5, and student timm/test_efficientnet on 0\.485,0\.456,0"):
        resolved(**unlike)
    for wrong in ({"mean": (0.5, 0.5, 0.5)}, {"mean": (0.5,), "deviation": (0.5,)}):
        with pytest.raises(SettingsError, match="give three of each, or none"):
            resolved(**wrong)
    with pytest.raises(SettingsError, match=r"mean is \(0\.5, 0\.5, 0\.5\), and data is 'digits'"):
        settings_of("digits", **HALVES._asdict())


def test_settings_from_before_there_were_others_are_of_imagenet() -> None:
    settings = resolved(teacher=TEACHER, pretrained=True)
    content = settings.to_json()
    assert Settings.from_json(content) == settings
    del content["mean"], content["deviation"]
    assert colours_of(Settings.from_json(content)) == IMAGENET
    assert Settings.from_json(content).resolved() == dataclasses.replace(settings, **IMAGENET._asdict())


def loaded(path: Path, colours: Colours, loader: str = "folder") -> tuple[Images, Images]:
    counts = listing.describe(path, loader)._asdict()
    return streamed.load(path, loader, CPU, image_size=SIDE, workers=0, rand_augment=0, **counts, colours=colours)


def drawn(path: Path, colours: Colours, loader: str = "folder", *, at_once: bool = False) -> list[torch.Tensor]:
    """The batches of an epoch."""
    images, _ = loaded(path, colours, loader)
    assert isinstance(images, Streamed)
    images = on_device(images) if at_once else images
    return [batch[0] for batch in images.draw(10, seed=0, epoch=0)]


@pytest.mark.parametrize("way", ["one by one", "at once", "shards"])
def test_pixels_are_normalised_by_them(folder: Path, tmp_path: Path, way: str) -> None:
    path, loader = folder, "folder"
    if way == "shards":
        path, loader = tmp_path / "shards", "webdataset"
        make_shards(folder, path)

    mean, deviation = (torch.tensor(values).double()[:, None, None] for values in IMAGENET)
    ours, theirs = (
        drawn(path, colours, loader, at_once=way == "at once")[0].double() for colours in (HALVES, IMAGENET)
    )
    torch.testing.assert_close(ours, (theirs * deviation + mean - 0.5) / 0.5, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_every_command_reads_a_run_with_its_own(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A teacher of random weights, whose batch norms know the images, stands in for one that was trained."""

    def weights(name: str, *, in_channels: int, classes: int) -> dict[str, torch.Tensor]:
        with seeded(0):
            model = libraries.build(name, in_channels=in_channels, classes=classes)
        for images in 5 * drawn(folder, HALVES):
            model(images)
        return model.state_dict()

    monkeypatch.setattr(libraries, "pretrained_tensors", weights)
    run, data = tmp_path / "run", ["--data-dir", str(folder)]
    student = [
        *("--student", "resnet8", "--student-channels", "4", "--student-epochs", "2", "--batch-size", "20"),
        *("--beta", "60", "--device", "cpu", "--dtype", "float32", "--threads", "1", "--methods", "ft", "--seeds", "1"),
        *("--workers", "0", "--resize-features"),
    ]
    words = [
        *("distill", "--data", "images", "--image-size", str(SIDE), "--teacher", TEACHER, "--pretrained"),
        *("--paraphraser-epochs", "30", "--paraphraser-batch-size", "10", "--paraphraser-held-out", "16"),
        *("--paraphraser-optimiser", "adam", "--paraphraser-learning-rate", "3e-3", *student, *data),
    ]
    assert main([*words, "--output", str(run)]) == 0
    assert colours_of(Settings.from_json(json.loads((run / "settings.json").read_text()))) == HALVES
    assert main([*words, "--output", str(run), "--resume"]) == 0
    accuracy = results_of(run)["methods"]["ft"]["students"][0]["accuracy"]
    checkpoint = run / "students" / "ft" / "seed0"

    capsys.readouterr()
    assert main(["evaluate", str(checkpoint), "--json", *data]) == 0
    evaluated = json.loads(capsys.readouterr().out)
    assert evaluated["accuracy"] == pytest.approx(accuracy)
    for colours, is_own in ((HALVES, True), (IMAGENET, False)):
        entropy = evaluate(read_trained(checkpoint, CPU).model, loaded(folder, colours)[1], FLOAT32)[1]
        assert (evaluated["cross_entropy"] == pytest.approx(entropy, rel=1e-4)) == is_own
    described = json.loads((checkpoint / "settings.json").read_text())["photographs"]
    assert (described["mean"], described["deviation"]) == ([0.5] * 3, [0.5] * 3)

    exported = tmp_path / "student.safetensors"
    assert main(["export", str(checkpoint), str(exported)]) == 0
    with safe_open(exported, "pt") as content:
        assert json.loads(content.metadata()["ftfast"])["photographs"]["mean"] == [0.5] * 3
    program, extra = tmp_path / "student.pt2", {"ftfast.json": ""}
    assert main(["export", str(checkpoint), str(program)]) == 0
    torch.export.load(program, extra_files=extra)
    assert json.loads(extra["ftfast.json"])["photographs"]["deviation"] == [0.5] * 3

    store = tmp_path / "store"
    assert main(["store", "build", str(run), str(store), "--views", "2", "--device", "cpu"]) == 0
    assert header.read(store).transform["normalisation"] == {"scale": 255, "mean": [0.5] * 3, "deviation": [0.5] * 3}
    assert main(["store", "verify", str(store), "--workers", "0", "--device", "cpu", *data]) == 0
    assert main(["distill", "--store", str(store), *student, *data, "--output", str(tmp_path / "stored")]) == 0
    assert results_of(tmp_path / "stored")["settings"]["mean"] == [0.5] * 3

    for given in (run / "teacher", checkpoint, exported):  # a later run takes its teacher's own
        model = TEACHER if given == run / "teacher" else "resnet8"
        channels = 0 if given == run / "teacher" else 4
        settings = resolved(teacher=model, teacher_channels=channels, teacher_checkpoint=str(given))
        assert colours_of(settings) == HALVES
