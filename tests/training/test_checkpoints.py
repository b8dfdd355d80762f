"""Checkpoint folders come back as they were; what is not a whole checkpoint of plain tensors is refused."""

import argparse
import json
import os
import pickle
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ftfast.distillation.models import registry
from ftfast.distillation.runtime import checkpoint, files
from ftfast.distillation.runtime.checkpoint import Checkpoint
from ftfast.errors import CheckpointError


def small_model(channels: int = 2, seed: int = 0) -> registry.ResNet:
    return registry.build_model("resnet8", channels, in_channels=1, classes=10, seed=seed)


def save_small(folder: Path) -> registry.ResNet:
    model = registry.place(small_model(), torch.device("cpu"))
    checkpoint.save(folder, Checkpoint(model.state_dict(), {"epoch": 3}, {"kind": "student", "model": "small"}))
    return model


class Code:
    """Unpickling one runs code."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch code_ran",)


def test_a_checkpoint_comes_back_as_it_was(tmp_path: Path) -> None:
    model = save_small(tmp_path / "kept")
    assert sorted(file.name for file in (tmp_path / "kept").iterdir()) == [
        "model.safetensors",
        "settings.json",
        "state.pt",
    ]
    back = checkpoint.load(tmp_path / "kept")
    other = small_model(seed=1)
    checkpoint.fill(other, back.tensors, tmp_path, "small")
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name])
    assert back.state == {"epoch": 3}
    assert back.description["kind"] == "student"
    assert torch.load(tmp_path / "kept" / "state.pt", weights_only=True) == {"epoch": 3}


def test_a_checkpoint_is_never_overwritten(tmp_path: Path) -> None:
    save_small(tmp_path / "kept")
    before = (tmp_path / "kept" / "model.safetensors").read_bytes()
    with pytest.raises(FileExistsError):
        checkpoint.save(tmp_path / "kept", Checkpoint({}, {}, {}))
    assert (tmp_path / "kept" / "model.safetensors").read_bytes() == before


def test_a_write_that_fails_leaves_no_checkpoint_and_the_next_one_succeeds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_space(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "rename", no_space)
        with pytest.raises(OSError, match="No space"):
            save_small(tmp_path / "kept")
    assert not (tmp_path / "kept").exists()
    save_small(tmp_path / "kept")
    assert checkpoint.load(tmp_path / "kept").state == {"epoch": 3}


@pytest.mark.parametrize("name", ["model.safetensors", "state.pt", "settings.json"])
@pytest.mark.parametrize("length", [0, 10, 0.5, -1])
def test_cut_files_are_refused(tmp_path: Path, name: str, length: float) -> None:
    save_small(tmp_path / "kept")
    path = tmp_path / "kept" / name
    content = path.read_bytes()
    # settings.json ends in "}\n": without the line's end it would still be whole
    path.write_bytes(content[: -2 if length == -1 else int(length if length >= 1 else length * len(content))])
    with pytest.raises(CheckpointError, match="cut short"):
        checkpoint.load(tmp_path / "kept")


@pytest.mark.parametrize("name", ["model.safetensors", "state.pt"])
def test_a_changed_byte_is_refused(tmp_path: Path, name: str) -> None:
    save_small(tmp_path / "kept")
    path = tmp_path / "kept" / name
    content = bytearray(path.read_bytes())
    content[-20] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="changed"):
        checkpoint.load(tmp_path / "kept")


@pytest.mark.parametrize(
    "change", [{"kind": "teacher"}, {"accuracy": 99.0}, {"sha256": []}, {"sha256": {}}, {"sha256": None}]
)
def test_a_changed_description_is_refused(tmp_path: Path, change: dict[str, object]) -> None:
    save_small(tmp_path / "kept")
    path = tmp_path / "kept" / "settings.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    for read in (checkpoint.load, checkpoint.read_description):
        with pytest.raises(CheckpointError, match=r"settings\.json is cut short or changed"):
            read(tmp_path / "kept")


@pytest.mark.parametrize("name", ["model.safetensors", "state.pt", "settings.json"])
def test_missing_files_are_refused(tmp_path: Path, name: str) -> None:
    save_small(tmp_path / "kept")
    (tmp_path / "kept" / name).unlink()
    with pytest.raises(CheckpointError, match=name):
        checkpoint.load(tmp_path / "kept")


@pytest.mark.parametrize(("field", "value", "message"), [("version", 2, "version 2"), ("format", "x", "no checkpoint")])
def test_newer_and_other_formats_are_refused(tmp_path: Path, field: str, value: object, message: str) -> None:
    save_small(tmp_path / "kept")
    path = tmp_path / "kept" / "settings.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), field: value}))
    with pytest.raises(CheckpointError, match=message):
        checkpoint.load(tmp_path / "kept")


@pytest.mark.parametrize("channels", [3, 4])
def test_another_models_tensors_are_refused(channels: int) -> None:
    with pytest.raises(CheckpointError, match=r"another model than a small one: 'stem.weight' is"):
        checkpoint.fill(small_model(), small_model(channels).state_dict(), Path("file"), "a small one")
    deeper = registry.build_model("resnet14", 2, in_channels=1, classes=10, seed=0)
    with pytest.raises(CheckpointError, match="does not have"):
        checkpoint.fill(small_model(), deeper.state_dict(), Path("file"), "a small one")
    with pytest.raises(CheckpointError, match="it lacks"):
        checkpoint.fill(deeper, small_model().state_dict(), Path("file"), "a deep one")


@pytest.mark.parametrize("wrapper", [None, "state_dict", "model", "net"])
def test_torch_files_of_tensors_are_taken(tmp_path: Path, wrapper: str | None) -> None:
    tensors = small_model().state_dict()
    torch.save(tensors if wrapper is None else {wrapper: tensors, "epoch": 3}, tmp_path / "teacher.pt")
    found, description = checkpoint.load_tensors(tmp_path / "teacher.pt")
    assert found.keys() == tensors.keys()
    assert description == {}


def test_safetensors_files_are_taken_and_cut_ones_refused(tmp_path: Path) -> None:
    path = tmp_path / "teacher.safetensors"
    save_file(dict(small_model().state_dict()), path)
    assert checkpoint.load_tensors(path)[0].keys() == small_model().state_dict().keys()
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="cut short"):
        checkpoint.load_tensors(path)


@pytest.mark.parametrize("keep", [0, 5, 100, 0.5, 0.99])
@pytest.mark.parametrize("zipped", [True, False])
def test_cut_torch_files_are_refused(tmp_path: Path, keep: float, zipped: bool) -> None:
    path = tmp_path / "teacher.pt"
    torch.save(small_model().state_dict(), path, _use_new_zipfile_serialization=zipped)
    content = path.read_bytes()
    path.write_bytes(content[: int(keep if keep >= 1 or keep == 0 else keep * len(content))])
    with pytest.raises(CheckpointError, match="cut short"):
        checkpoint.load_tensors(path)


def test_a_teacher_beside_its_scripts_arguments_is_read(tmp_path: Path) -> None:
    """As timm and RepDistiller save theirs."""
    own = small_model().state_dict()
    torch.save({"opt": argparse.Namespace(lr=0.1), "model": own}, tmp_path / "teacher.pt")
    assert checkpoint.load_tensors(tmp_path / "teacher.pt")[0].keys() == own.keys()


@pytest.mark.parametrize("form", ["pickle", "torch", "module"])
def test_pickles_with_code_are_refused_and_the_code_does_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "teacher.pt"
    if form == "pickle":
        path.write_bytes(pickle.dumps({"state_dict": Code()}))
    else:
        torch.save({"state_dict": Code()} if form == "torch" else small_model(), path)
    with pytest.raises(CheckpointError, match="may hold code"):
        checkpoint.load_tensors(path)
    assert not (tmp_path / "code_ran").exists()


@pytest.mark.parametrize("content", [[1, 2], {}, {"epoch": 3}, 5])
def test_files_without_a_model_are_refused(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "teacher.pt")
    with pytest.raises(CheckpointError, match="holds no model"):
        checkpoint.load_tensors(tmp_path / "teacher.pt")


@pytest.mark.parametrize("name", [3, None, ("stem", "weight")])
def test_tensors_without_names_are_refused(tmp_path: Path, name: object) -> None:
    torch.save({**small_model().state_dict(), name: torch.zeros(1)}, tmp_path / "teacher.pt")
    with pytest.raises(CheckpointError, match="holds no model"):
        checkpoint.load_tensors(tmp_path / "teacher.pt")


@pytest.mark.parametrize("form", ["sparse", "meta", "int8", "complex", "nan", "infinite in float32"])
def test_weights_that_no_trained_model_has_are_refused(tmp_path: Path, form: str) -> None:
    tensors = small_model().state_dict()
    weight = tensors["stem.weight"]
    tensors["stem.weight"] = {
        "sparse": weight.to_sparse(),
        "meta": weight.to("meta"),
        "int8": weight.to(torch.int8),
        "complex": weight.to(torch.complex64),
        "nan": weight * float("nan"),
        "infinite in float32": torch.full_like(weight, 1e300, dtype=torch.float64),
    }[form]
    path = tmp_path / "teacher.pt"
    torch.save(tensors, path)
    with pytest.raises(CheckpointError, match=r"teacher\.pt holds 'stem\.weight'"):
        checkpoint.fill(small_model(), checkpoint.load_tensors(path)[0], path, "small")


def test_torch_files_with_changed_bytes_are_refused_or_read(tmp_path: Path) -> None:
    """Whatever a byte does to a file without a hash, it is no traceback."""
    path = tmp_path / "teacher.pt"
    for zipped in (True, False):
        torch.save({"weight": torch.zeros(2)}, path, _use_new_zipfile_serialization=zipped)
        content = path.read_bytes()
        for position in range(0, len(content), 3):
            path.write_bytes(content[:position] + bytes([content[position] ^ 0xFF]) + content[position + 1 :])
            with suppress(CheckpointError):
                checkpoint.load_tensors(path)


def test_a_path_that_is_not_there_is_refused(tmp_path: Path) -> None:
    for name in ("teacher.pt", "teacher.safetensors"):
        with pytest.raises(CheckpointError, match="cannot be read"):
            checkpoint.load_tensors(tmp_path / name)


def test_folders_made_on_the_way_are_flushed_into_those_above(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or a power failure takes a whole tree whose files were flushed."""
    flushed: list[Path] = []
    flush = files._flush
    monkeypatch.setattr(files, "_flush", lambda path: (flushed.append(path), flush(path)))
    files.write_text(tmp_path / "students" / "ft" / "one.txt", "1")
    assert flushed[:2] == [tmp_path, tmp_path / "students"]
    assert flushed[-1] == tmp_path / "students" / "ft"
    assert (tmp_path / "students" / "ft" / "one.txt").read_text() == "1"
