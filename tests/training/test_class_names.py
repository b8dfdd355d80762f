"""Labels that are shifted look like any others, so classes are compared by name wherever two sides know them."""

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ftfast.commands.evaluate import evaluate_checkpoint
from ftfast.commands.export import export_checkpoint
from ftfast.distillation.data.class_names import difference
from ftfast.distillation.data.photographs import listing, streamed
from ftfast.distillation.data.source import Source
from ftfast.distillation.phases.teacher import build, read_teacher
from ftfast.distillation.runtime import checkpoint
from ftfast.distillation.runtime.checkpoint import Checkpoint
from ftfast.distillation.settings.presets import settings_of
from ftfast.distillation.training import resumable
from ftfast.errors import CheckpointError, DataError
from tests.photographs.photograph_folder import make_folder, make_shards

CPU = torch.device("cpu")
MODEL = {"name": "resnet8", "channels": 4, "shortcut": "identity"}
NAMES = ["apple", "bird", "cat"]


def named_folder(path: Path, train: list[str], val: list[str]) -> Path:
    make_folder(path, classes=3, train=12, val=6)
    for part, names in (("train", train), ("val", val)):
        for number, name in enumerate(names):
            (path / part / f"class{number:02}").rename(path / part / name)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return named_folder(tmp_path_factory.mktemp("photographs"), NAMES, NAMES)


@pytest.fixture(scope="module")
def shifted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return named_folder(tmp_path_factory.mktemp("shifted"), NAMES, ["bird", "cat", "zz_apple"])


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As many classes under other names, one of which moves all labels."""
    names = ["bird", "cat", "zz_apple"]
    return named_folder(tmp_path_factory.mktemp("others"), names, names)


def load(folder: Path, classes: int) -> None:
    streamed.load(
        *(folder, "folder", CPU), image_size=16, workers=0, rand_augment=0, classes=classes, train_images=12,
        test_images=6,
    )  # fmt: skip


@pytest.mark.parametrize("loader", ["folder", "gpu"])
def test_unlike_classes_in_train_and_val_are_refused_naming_both(shifted: Path, loader: str) -> None:
    expected = (
        r"has 3 classes in train and 3 in val: train has apple, bird, cat and val has bird, cat, zz_apple "
        r"\(only in train: apple; only in val: zz_apple\)"
    )
    with pytest.raises(DataError, match=expected):
        listing.describe(shifted, loader)
    with pytest.raises(DataError, match=expected):  # where the numbers are given, nothing is counted before
        load(shifted, classes=3)


def test_other_than_the_number_of_classes_that_is_given_is_refused(folder: Path) -> None:
    with pytest.raises(DataError, match="has 3 classes, and 1000 are asked for"):
        load(folder, classes=1000)


def test_folders_to_train_on_are_not_tested_by_shards(folder: Path, tmp_path: Path) -> None:
    """Whose labels have no names that could be compared."""
    make_shards(folder, tmp_path)
    shutil.copytree(folder / "train", tmp_path / "train")
    assert isinstance(listing.list_photographs(tmp_path, "gpu", "train").files, listing.FolderFiles)
    with pytest.raises(DataError, match="val is not there"):
        listing.describe(tmp_path, "gpu")


def test_a_class_without_photographs_is_named(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "folder")
    (tmp_path / "folder" / "val" / "bee").mkdir()
    with pytest.raises(DataError, match=r"val/bee holds no photographs; every folder there is a class"):
        listing.describe(tmp_path / "folder", "folder")


def test_loops_of_links_pipes_and_hidden_folders_among_photographs(folder: Path, tmp_path: Path) -> None:
    """A loop ends, a pipe would be waited for, and what notebooks leave is no class."""
    home = tmp_path / "folder"
    shutil.copytree(folder, home)
    expected = [listing.list_photographs(folder, "folder", part) for part in ("train", "val")]
    apple = next((home / "train").iterdir())
    (apple / "again").symlink_to(apple)
    (apple / "up").symlink_to(home / "train")
    os.mkfifo(apple / "waiting.jpeg")
    for hidden in (home / "val" / ".ipynb_checkpoints", apple / ".ipynb_checkpoints"):
        hidden.mkdir()
        shutil.copy(next(path for path in apple.iterdir() if path.is_file()), hidden / "copy.jpeg")
    (apple / "inside").symlink_to(next(path for path in (home / "val").iterdir() if path.name[0] != "."))
    (apple / "missing.jpeg").symlink_to("nowhere.jpeg")
    found = [listing.list_photographs(home, "folder", part) for part in ("train", "val")]
    assert [each.class_names for each in found] == [each.class_names for each in expected]
    names = [Path(found[0].files.name(place)) for place in range(len(found[0].labels))]
    assert not [name for name in names if name.is_fifo() or ".ipynb_checkpoints" in name.parts]
    assert len(set(names)) == len(names)
    assert (apple / "missing.jpeg") in names  # which is told where it is read
    assert any(name.parent.name == "inside" for name in names)
    assert np.array_equal(found[1].labels, expected[1].labels)


def test_differences_are_told_however_many_names_there_are() -> None:
    names = [f"n{number:08}" for number in range(1000)]
    assert difference(("a", names), ("b", list(names))) == difference(("a", None), ("b", names)) == ""
    said = difference(("a", names), ("b", [*names[:743], "x\n\x1b[31m", *names[744:]]))
    assert "only in a: n00000743; only in b: x\\n\\x1b[31m" in said
    assert len(said) < 700
    assert "the same ones in another order" in difference(("a", ["x", "y"]), ("b", ["y", "x"]))


@pytest.fixture
def trained(folder: Path, tmp_path: Path) -> Path:
    """A teacher's checkpoint, as a run on the folder leaves it."""
    settings = settings_of("images", data_dir=str(folder), **small())
    model = build(MODEL, settings.dataset(), seed=0, device=CPU)
    named = listing.named(folder, "folder")
    assert named == {"class_names": NAMES}
    description = {
        **{"kind": "teacher", "model": MODEL, "data": "images", "dtype": "float32", "accuracy": 50.0},
        **{"photographs": {"classes": 3, "size": 16}, **named},
    }
    checkpoint.save(tmp_path / "teacher", Checkpoint(model.state_dict(), {"history": []}, description))
    return tmp_path / "teacher"


def small(**changes: Any) -> dict[str, Any]:
    return {
        **{"classes": 3, "train_images": 12, "test_images": 6, "image_size": 16, "batch_size": 4, "device": "cpu"},
        **{"paraphraser_held_out": 3, "teacher": "resnet8", "teacher_channels": 4, "student": "resnet8"},
        **{"student_channels": 4, "workers": 0, **changes},
    }


REFUSED = (
    r"was trained on other classes than --data-dir has: the checkpoint has apple, bird, cat and --data-dir has bird"
)


def test_a_checkpoint_is_evaluated_on_its_own_classes_alone(trained: Path, folder: Path, others: Path) -> None:
    assert evaluate_checkpoint(trained, source=Source(folder), device="cpu")["test_images"] == 6
    with pytest.raises(CheckpointError, match=REFUSED):
        evaluate_checkpoint(trained, source=Source(others), device="cpu")


def test_a_teacher_of_other_classes_is_refused(trained: Path, folder: Path, others: Path) -> None:
    exported = trained.with_suffix(".safetensors")
    export_checkpoint(trained, exported)
    for path in (trained, exported):
        given = {"teacher_checkpoint": str(path)}
        assert read_teacher(settings_of("images", data_dir=str(folder), **small(**given)))
        with pytest.raises(CheckpointError, match=REFUSED):
            read_teacher(settings_of("images", data_dir=str(others), **small(**given)))


def test_a_run_goes_on_with_its_own_classes_alone(trained: Path, folder: Path, others: Path) -> None:
    kept = checkpoint.read_description(trained)
    expected = {name: kept[name] for name in ("kind", "model", "photographs")}
    for named in (listing.named(folder, "folder"), {}):  # without names, as of shards or an earlier version
        assert resumable.read_finished(trained, {**expected, **named}) is not None
    with pytest.raises(CheckpointError, match=REFUSED):
        resumable.read_finished(trained, {**expected, **listing.named(others, "folder")})
