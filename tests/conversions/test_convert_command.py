"""ftfast convert writes what convert_state_dict gives, whole or not at all, and says which key became which."""

import argparse
import importlib
import json
import os

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import ftfast
from ftfast.cli import main

PROJECTS = ("ftfast", "official", "torchdistill", "mmrazor", "repdistiller", "zoo")


@pytest.fixture
def own():
    return ftfast.Paraphraser(4, 0.5, norm="batch").state_dict()


@pytest.fixture
def checkpoint(tmp_path, own):
    path = tmp_path / "paraphraser.pth"
    torch.save({"epoch": 3, "state_dict": own}, path)
    return path


def read(path):
    return load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("to", [project for project in PROJECTS if project != "official"])
def test_the_file_holds_what_the_function_gives(checkpoint, own, tmp_path, to, suffix, capsys):
    output = tmp_path / f"out{suffix}"
    assert main(["convert", str(checkpoint), str(output), "--to", to]) == 0
    expected = ftfast.convert_state_dict(own, to)
    written = read(output)
    assert written.keys() == expected.keys()
    assert all(torch.equal(written[key], expected[key]) for key in expected)
    shown = capsys.readouterr().out
    assert all(key in shown for key in expected)
    assert "4 channels to factors of 2" in shown
    back = tmp_path / f"back{suffix}"
    assert main(["convert", str(output), str(back)]) == 0
    moved = eval(capsys.readouterr().out.strip().rpartition("it loads into ")[2])
    assert isinstance(moved, ftfast.Paraphraser)
    moved.load_state_dict(read(back), strict=True)


def test_json(checkpoint, tmp_path, capsys):
    assert main(["convert", str(checkpoint), str(tmp_path / "out.pth"), "--to", "torchdistill", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["from"], found["to"], found["network"]) == (["ftfast"], "torchdistill", "paraphraser")
    assert (found["in_channels"], found["factor_channels"], found["batch_norm"]) == (4, 2, True)
    row = {"old": "state_dict.norm.1.weight", "new": "encoder.4.weight", "shape": [2]}
    assert row in found["tensors"]


def test_prefix_part_and_under(tmp_path, capsys):
    head = ftfast.FactorTransfer(ftfast.Paraphraser(4), ftfast.Translator(3, 2))
    torch.save(head.state_dict(), tmp_path / "head.pth")
    arguments = ["convert", str(tmp_path / "head.pth"), str(tmp_path / "out.pth"), "--to", "official"]
    assert main(arguments) == 2
    assert "name one of them with part" in capsys.readouterr().err
    assert main([*arguments, "--part", "translator", "--prefix", "module.", "--under", "state_dict"]) == 0
    written = read(tmp_path / "out.pth")
    assert list(written) == ["state_dict"]
    assert torch.equal(written["state_dict"]["module.conv0.weight"], head.translator.encoder[0].weight)


def test_an_existing_file_is_kept_unless_asked(checkpoint, tmp_path, capsys):
    output = tmp_path / "out.pth"
    output.write_bytes(b"kept")
    assert main(["convert", str(checkpoint), str(output)]) == 2
    assert "there already; give --overwrite" in capsys.readouterr().err
    assert output.read_bytes() == b"kept"
    assert main(["convert", str(checkpoint), str(checkpoint), "--overwrite"]) == 0
    assert "encoder.0.weight" in read(checkpoint)


class History:
    """As mmengine keeps numbers: arrays, and its own methods by name."""

    def __init__(self):
        self.values = np.array([1.0, 2.0])

    def mean(self):
        return self.values.mean()

    def __getstate__(self):
        return {**self.__dict__, "methods": {"mean": History.mean}}


class Hostile:
    """Unpickling one calls a function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


ran = []


class Restored:
    """Unpickling one calls its own method."""

    def __init__(self):
        self.content = 1

    def __setstate__(self, state):
        ran.append(state)


TRAINING_CHECKPOINTS = {
    "timm": {"args": argparse.Namespace(lr=0.1, betas=[0.9]), "metric": np.float64(71.5), "arch": "resnet18"},
    "mmengine": {"meta": {"epoch": 3}, "message_hub": {"log_scalars": {"loss": History()}}},
    "RepDistiller": {"opt": argparse.Namespace(lr=0.1), "accuracy": 71.5},
    "hostile": {
        "exec": Hostile(exec, "import pathlib; pathlib.Path('ran').touch()"),
        "getattr": Hostile(getattr, "".join, "__class__"),
        "setstate": Restored(),
        "import": Hostile(importlib.import_module, "this"),
    },
}


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("project", TRAINING_CHECKPOINTS)
def test_tensors_are_taken_out_from_beside_objects_of_which_nothing_is_run(own, tmp_path, project, legacy, monkeypatch):
    monkeypatch.chdir(tmp_path)
    content = {"first": TRAINING_CHECKPOINTS[project], "state_dict": {"paraphraser": own, "fc.bias": torch.zeros(3)}}
    torch.save({**content, **TRAINING_CHECKPOINTS[project]}, "in.pth", _use_new_zipfile_serialization=not legacy)
    assert main(["convert", "in.pth", "out.pth", "--part", "paraphraser"]) == 0
    written = read(tmp_path / "out.pth")
    assert all(torch.equal(written[key], own[key]) for key in own)
    assert not ran
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_a_call_of_the_system_is_refused_by_name(own, tmp_path, legacy, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    hostile = {"state_dict": own, "x": Hostile(os.system, "touch ran")}
    torch.save(hostile, "in.pth", _use_new_zipfile_serialization=not legacy)
    assert main(["convert", "in.pth", "out.pth"]) == 2
    assert "in.pth holds posix.system, and objects are not loaded" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.pth"]


def write_bytes(content):
    return lambda path: path.write_bytes(content)


def write_cut(path):
    torch.save(ftfast.Translator(8, 8).state_dict(), path)
    path.write_bytes(path.read_bytes()[:-3000])


WRONG = {
    "text": (write_bytes(b"<html>"), "not a whole file of torch.save"),
    "empty": (write_bytes(b""), "not a whole file of torch.save"),
    "cut": (write_cut, "not a whole file of torch.save"),
    "module": (lambda path: torch.save(ftfast.Translator(3, 2), path), "holds ftfast.modules.Translator, and objects"),
    "options": (
        lambda path: torch.save({"model": {}, "opt": argparse.Namespace()}, path),
        "holds argparse.Namespace, and objects",
    ),
    "list": (lambda path: torch.save([1], path), "holds a list"),
    "foreign": (lambda path: torch.save({"fc.weight": torch.zeros(3, 3)}, path), "fits no project"),
    "missing": (lambda path: None, "No such file"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_file_is_one_sentence_and_writes_nothing(tmp_path, wrong, capsys):
    make, says = WRONG[wrong]
    make(tmp_path / "in.pth")
    before = set(tmp_path.iterdir())
    assert main(["convert", str(tmp_path / "in.pth"), str(tmp_path / "out.pth")]) == 2
    message = capsys.readouterr().err
    assert says in message
    assert "in.pth" in message
    assert message.count("\n") == 1
    assert set(tmp_path.iterdir()) == before


def test_a_damaged_safetensors_file(tmp_path, capsys):
    source = tmp_path / "in.safetensors"
    save_file({"a": torch.zeros(3)}, source)
    source.write_bytes(source.read_bytes()[:-4])
    assert main(["convert", str(source), str(tmp_path / "out.pth")]) == 2
    assert "not a whole safetensors file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("output", "options", "says"),
    [
        ("out.onnx", [], "takes a name that ends in"),
        ("out.pth", ["--to", "caffe"], "to is 'caffe'; it takes ftfast, official"),
        ("out.pth", ["--from", "caffe"], "from is 'caffe'; it takes ftfast, official"),
        ("out.pth", ["--to", "official"], "no batch norm"),
        ("out.safetensors", ["--under", "model"], "no dictionaries"),
    ],
    ids=["suffix", "to", "from", "norm", "under"],
)
def test_wrong_arguments(checkpoint, tmp_path, output, options, says, capsys):
    assert main(["convert", str(checkpoint), str(tmp_path / output), *options]) == 2
    assert says in capsys.readouterr().err
    assert not (tmp_path / output).exists()


def test_a_failed_write_leaves_the_old_file(checkpoint, tmp_path, monkeypatch):
    from ftfast.distillation.runtime import files

    output = tmp_path / "out.pth"
    output.write_bytes(b"kept")

    def fail(_path):
        raise OSError(28, "No space left on device", str(output))

    monkeypatch.setattr(files, "_flush", fail)
    assert main(["convert", str(checkpoint), str(output), "--overwrite"]) == 2
    assert output.read_bytes() == b"kept"
