"""A factor store of photographs: boxes are drawn once, and every later epoch cuts the same ones."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from ftfast.cli import main
from ftfast.distillation.data.photographs import crops, decoding, listing, streamed
from ftfast.distillation.data.photographs.decoding import IMAGENET
from ftfast.distillation.data.stored_views import PhotographViews, viewed
from ftfast.distillation.runtime import checkpoint
from ftfast.distillation.store.read import Store
from ftfast.errors import StoreError
from tests.photographs.photograph_folder import make_folder, make_shards
from tests.processes.launching import results_of

CPU = torch.device("cpu")
CLASSES, TRAIN, TEST, SIDE = 4, 80, 16, 24
RECIPE = [
    *("distill", "--data", "images", "--image-size", str(SIDE), "--workers", "0", "--methods", "ft", "--seeds", "1"),
    *("--teacher", "resnet8", "--teacher-channels", "4", "--teacher-epochs", "2", "--paraphraser-epochs", "3"),
    *("--paraphraser-batch-size", "20", "--paraphraser-held-out", "16", "--paraphraser-optimiser", "adam"),
]
STUDENT = [
    *("--student", "resnet8", "--student-channels", "4", "--student-epochs", "2", "--batch-size", "20"),
    *("--beta", "60", "--device", "cpu", "--dtype", "float32", "--threads", "1"),
]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photographs as files and as shards, a run on the files, and its store."""
    home = tmp_path_factory.mktemp("photographs")
    make_folder(home / "folder", classes=CLASSES, train=TRAIN, val=TEST)
    make_shards(home / "folder", home / "webdataset", images_per_shard=30)
    words = [*RECIPE, *STUDENT, "--data-dir", str(home / "folder"), "--output", str(home / "run")]
    assert main(words) == 0
    built = ["store", "build", str(home / "run"), str(home / "store"), "--views", "3", "--batch-size", "16"]
    assert main([*built, "--shard-images", "32", "--workers", "1", "--device", "cpu"]) == 0
    return home


def images_of(folder: Path, loader: str = "folder", workers: int = 0) -> PhotographViews:
    counts = listing.describe(folder, loader)
    train, _ = streamed.load(folder, loader, CPU, image_size=SIDE, workers=workers, rand_augment=0, **counts._asdict())
    found = viewed(train, folder)
    assert isinstance(found, PhotographViews)
    return found


def test_boxes_are_those_that_epochs_would_draw(home: Path) -> None:
    images, store = images_of(home / "folder"), Store(home / "store")
    assert store.header.images == TRAIN
    for row in (0, 17, 79):
        content = decoding.Encoded.of(images.images.photographs.files.read(row), "")
        for view in range(3):
            box = crops.draw_box(content.height, content.width, crops.sample_seed(store.header.seed, view, row))
            assert store.boxes[row, view].tolist() == [int(value) for value in box]
            cut = next(iter(images.cut([(np.array([row]), store.boxes[None, row, view])])))[0]
            square = crops.cut_box(content.decode(), box, SIDE)
            mean, deviation = (torch.tensor(values)[:, None, None] for values in IMAGENET)
            torch.testing.assert_close(cut[0], (square / 255 - mean) / deviation)


def test_a_store_is_verified_and_trained_from(home: Path, tmp_path: Path) -> None:
    data = ["--data-dir", str(home / "folder")]
    assert main(["store", "verify", str(home / "store"), "--workers", "0", "--device", "cpu", *data]) == 0
    words = ["distill", "--store", str(home / "store"), "--methods", "ft", "--seeds", "1", *STUDENT, *data]
    for workers in ("0", "2"):
        assert main([*words, "--workers", workers, "--output", str(tmp_path / workers)]) == 0
    alone, helped = (results_of(tmp_path / workers)["methods"]["ft"]["students"][0] for workers in ("0", "2"))
    assert alone["accuracy"] == helped["accuracy"]
    assert alone["history"][1]["losses"] == helped["history"][1]["losses"]


@pytest.mark.parametrize(
    ("loader", "words", "said"),
    [
        ("webdataset", ["--loader", "webdataset"], "data differs from what the store"),
        ("folder", ["--image-size", "32"], "image_size is 32, and the store"),
        ("folder", ["--rand-augment", "5"], "rand_augment is 5, and store is given"),
        ("folder", ["--loader", "synthetic"], "a factor store takes --loader folder or webdataset"),
        ("folder", ["--train-images", "60"], "train_images is 60, and the store"),
    ],
)
def test_other_photographs_are_refused(
    home: Path, tmp_path: Path, loader: str, words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["distill", "--store", str(home / "store"), "--methods", "ft", *STUDENT, "--output", str(tmp_path / "run")]
    assert main([*given, "--workers", "0", "--data-dir", str(home / loader), *words]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_new_name_or_another_box_is_another_store(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashes = images_of(home / "folder").hashes()
    assert images_of(home / "folder").hashes() == hashes
    monkeypatch.setattr(crops, "SCALE", (0.25, 1.0))
    changed = images_of(home / "folder").hashes()
    assert {name for name in hashes if hashes[name] != changed[name]} == {"transform"}
    found = images_of(home / "webdataset", "webdataset").hashes()
    assert {name for name in hashes if hashes[name] != found[name]} == {"transform", "data"}


def test_a_store_takes_photographs_of_the_classes_that_its_teacher_learned(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = checkpoint.read_description(home / "run" / "students" / "ft" / "seed0")
    assert kept["class_names"] == [f"class{number:02}" for number in range(CLASSES)]
    for part in ("train", "val"):
        shutil.copytree(home / "folder" / part, tmp_path / "data" / part)
        (tmp_path / "data" / part / "class00").rename(tmp_path / "data" / part / "zz")
    words = ["store", "build", str(home / "run"), str(tmp_path / "store"), "--data-dir", str(tmp_path / "data")]
    assert main([*words, "--device", "cpu", "--workers", "0"]) == 2
    assert "run/teacher was trained on other classes than --data-dir has: the checkpoint" in capsys.readouterr().err
    assert not (tmp_path / "store").exists()


def test_a_gpus_decoder_is_refused(home: Path) -> None:
    images = images_of(home / "folder").images
    object.__setattr__(images.reading, "on_device", True)
    with pytest.raises(StoreError, match="loader is 'gpu', whose decoder differs"):
        viewed(images, home / "folder")


def test_photographs_in_shards_have_a_store_too(home: Path, tmp_path: Path) -> None:
    data = ["--data-dir", str(home / "webdataset"), "--loader", "webdataset"]
    teacher = ["--teacher-checkpoint", str(home / "run" / "teacher")]
    assert main([*RECIPE, *STUDENT, *teacher, *data, "--output", str(tmp_path / "run")]) == 0
    assert main(["store", "build", str(tmp_path / "run"), str(tmp_path / "store"), "--device", "cpu"]) == 0
    words = ["distill", "--store", str(tmp_path / "store"), "--methods", "ft", "--seeds", "1", *STUDENT, *data[:2]]
    assert main([*words, "--workers", "0", "--output", str(tmp_path / "student")]) == 0
