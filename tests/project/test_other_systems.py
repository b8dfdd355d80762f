"""Systems that lack what this one has: a home folder, locks, flushes, a notebook's backend, standard streams, numpy."""

import errno
import json
import logging
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import ftfast
from ftfast import cli, dispatch, extension
from ftfast.cli import main
from ftfast.diagnosis import check
from ftfast.distillation.data import source
from ftfast.distillation.data.photographs import shard_index
from ftfast.distillation.monitor import plots
from ftfast.distillation.runtime import files
from ftfast.errors import DataError
from ftfast.ops import kernel_table
from ftfast.user_folder import user_folder
from tests.project import versions

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CPU = torch.device("cpu")


@pytest.fixture(params=["unknown", "/dev/null", "unreadable"])
def home(request, monkeypatch, tmp_path):
    """A home folder that is none."""
    for name in ("FTFAST_CACHE", "FTFAST_DATA", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    if request.param == "unknown":

        def no_home():
            raise RuntimeError("Could not determine home directory.")

        monkeypatch.setattr(Path, "home", no_home)
    elif request.param == "/dev/null":
        monkeypatch.setenv("HOME", "/dev/null")
    else:
        monkeypatch.setenv("HOME", str(tmp_path))
        read_text = Path.read_text

        def refused(path, *arguments, **options):
            if path.is_relative_to(tmp_path):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
            return read_text(path, *arguments, **options)

        monkeypatch.setattr(Path, "read_text", refused)
    kernel_table.forget_tables()
    yield request.param
    kernel_table.forget_tables()


def test_training_needs_no_home_folder(home):
    """It raised: not a readable table of ftfast tune."""
    head = ftfast.FactorTransfer(ftfast.Paraphraser(8), ftfast.Translator(6, 4))
    head(torch.randn(2, 6, 3, 3), torch.randn(2, 8, 3, 3)).backward()
    work = kernel_table.Work("weight_gradient", "bfloat16", 32, 7, 7, 24, 16)
    assert kernel_table.choose_kernel(work, CPU, ("library",), "library").kernel == "library"


def test_what_needs_a_home_folder_says_so(home, tmp_path, capsys):
    assert len(shard_index._places(tmp_path, "train")) == (1 if home == "unknown" else 2)
    if home != "unknown":
        return
    assert user_folder() is None
    with pytest.raises(DataError, match="there is no home folder with data; give --data-dir"):
        source.default_folder()
    if extension.load_extension()[0] is not None:
        assert main(["tune", "4x8+8:8x3x3"]) == 2
        assert "there is no home folder to keep the table in; give --out" in capsys.readouterr().err


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK])
def test_a_file_system_without_locks_or_flushes_is_warned_of_once(number, tmp_path, monkeypatch, caplog):
    """Both ended the run."""

    def not_offered(*arguments):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(files, "_said", set())
    monkeypatch.setattr("fcntl.flock", not_offered)
    monkeypatch.setattr(os, "fsync", not_offered)
    with caplog.at_level(logging.WARNING, "ftfast"):
        for name in ("one", "two"):
            files.write_text(tmp_path / name / "file", name)
            with files.new_folder(tmp_path / name / "folder"):
                pass
            with files.locked(tmp_path / name):
                pass
    assert (tmp_path / "two/file").read_text() == "two"
    said = [record.message for record in caplog.records]
    assert len(said) == 2
    assert "cannot be flushed" in said[0]
    assert "locks no files" in said[1]
    assert all(str(tmp_path) in line and os.strerror(number) in line for line in said)


def test_a_full_disk_still_fails_a_flush(tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        files.write_text(tmp_path / "file", "1")
    assert not (tmp_path / "file").exists()


@pytest.fixture
def no_matplotlib():
    """It is imported anew in the test, and is afterwards what it was before."""
    pytest.importorskip("matplotlib")
    kept = _take_matplotlib()
    yield
    _take_matplotlib()
    sys.modules.update(kept)


def _take_matplotlib():
    names = [name for name in sys.modules if name.partition(".")[0] in ("matplotlib", "mpl_toolkits")]
    return {name: sys.modules.pop(name) for name in names}


@pytest.mark.parametrize("chosen", ["module://matplotlib_inline.backend_inline", "nonsense", "agg"])
def test_pictures_are_drawn_whatever_backend_a_notebook_has_chosen(chosen, monkeypatch, no_matplotlib):
    """matplotlib refuses to be imported with a backend that is not installed."""
    monkeypatch.setenv("MPLBACKEND", chosen)
    figure = plots.new_figure(2, 2)
    figure.subplots()
    assert plots.drawn(figure, "png").startswith(b"\x89PNG")
    assert os.environ["MPLBACKEND"] == chosen
    if chosen == "agg":
        assert plots.import_matplotlib().rcParams["backend"] == "agg"


def test_closed_streams_are_opened_before_a_checkpoint_gets_their_numbers(monkeypatch):
    """ftfast info >&- ended in a traceback, and the first file that a run opened had number 1."""
    said = []
    monkeypatch.setattr(cli, "print", lambda *words, file: said.append(words[0]), raising=False)
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)
    cli.open_closed_streams()
    opened = (sys.stdout, sys.stderr)
    print("discarded")
    for stream in opened:
        stream.close()
    assert said == ["ftfast: warning: standard output is closed, and what would go there is lost."]


def interpreter_that_says(monkeypatch, status, out, err):
    backends = [(dispatch.BACKENDS[name], CPU) for name in ("native", "triton")]
    monkeypatch.setattr(check, "_backends", lambda asked: backends)
    monkeypatch.setattr(check, "supports", lambda backend, *rest: dispatch.Support(backend == "native", "on the CPU"))
    monkeypatch.setattr(type(backends[1][0]), "environment_to_run", lambda self, device: {"TRITON_INTERPRET": "1"})
    monkeypatch.setattr(check.check_loss, "check_backend", lambda *rest: [check.check_loss.check_case(*CASE)])
    monkeypatch.setattr(check.check_head, "check_heads", lambda *rest: [])
    monkeypatch.setattr(
        check.subprocess, "run", lambda *rest, **options: subprocess.CompletedProcess(rest, status, out, err)
    )


CASE = (SimpleNamespace(name="reference", place=lambda device: "cpu"), CPU, torch.float32, 1, "nchw")


@pytest.mark.parametrize(
    ("status", "err", "reason"),
    [
        (2, "ftfast check: error: it needs the package numpy; pip install 'ftfast[distill]'.\n", "package numpy"),
        (1, "Traceback (most recent call last):\n  ...\nAttributeError: _broadcast_shape\n", "_broadcast_shape"),
        (-11, "", "ended with status -11"),
    ],
)
def test_check_goes_on_where_tritons_interpreter_fails(monkeypatch, capsys, status, err, reason):
    """A bare install has no numpy, and the check ended in a traceback after its native rows."""
    interpreter_that_says(monkeypatch, status, "", err)
    assert main(["check"]) == 0
    shown = capsys.readouterr().out
    assert re.search(rf"^interpreter: not checked, because .*{re.escape(reason)}", shown, re.MULTILINE)
    assert "1 of 1 cases agree" in shown
    assert main(["check", "--json"]) == 0
    assert reason in json.loads(capsys.readouterr().out)["skipped"][0]


def test_check_is_one_line_and_shows_rows_where_they_are_asked_for_or_wrong(monkeypatch, capsys):
    interpreter_that_says(monkeypatch, 2, "", "no interpreter\n")
    assert main(["check"]) == 0
    assert re.fullmatch(
        r"interpreter: .*\n1 of 1 cases agree with the float64 reference \(reference on cpu 1\); the largest error is "
        r"\d\.\d\d of what its dtype allows\.\n",
        capsys.readouterr().out,
    )
    row = r"^reference *cpu +float32 +float32 +1 +nchw .*"
    assert main(["check", "--rows"]) == 0
    assert re.search(row + r"\d$", capsys.readouterr().out, re.MULTILINE)
    monkeypatch.setitem(check.check_loss.LOSS_BOUNDS, torch.float32, 1e-30)
    assert main(["check"]) == 1
    shown = capsys.readouterr().out
    assert re.search(row + "WRONG$", shown, re.MULTILINE)
    assert "0 of 1 cases agree" in shown


def test_the_library_imports_where_there_is_neither_posix_nor_a_package_beside_torch():
    script = (
        "import os, sys, torch\n"
        "absent = ('fcntl', 'resource', 'numpy', 'safetensors', 'rich', 'torchvision', 'matplotlib', 'tensorboard')\n"
        "sys.modules.update(dict.fromkeys(absent))\n"
        "del os.register_at_fork\n"
        "import ftfast; extra = ('Distilled', 'FactorStore', 'distill', 'write_factors')\n"
        "for name in ftfast.__all__:\n"
        "    try: getattr(ftfast, name)\n"
        "    except ModuleNotFoundError as error: assert name in extra and '[distill]' in str(error), error\n"
        "print(float(ftfast.ft_loss(torch.ones(2, 3), torch.ones(2, 3))))\n"
        "from ftfast.cli import main\n"
        "raise SystemExit([main([name, '--help']) for name in ('distill', 'evaluate', 'export')] != [2, 2, 2])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "0.0\n"
    said = [line for line in done.stderr.splitlines() if line.startswith("ftfast")]
    for line, name in zip(said, ("distill", "evaluate", "export"), strict=True):
        assert re.fullmatch(rf"ftfast {name}: error: it needs the package \w+; pip install 'ftfast\[distill\]'\.", line)


def test_a_module_that_windows_lacks_is_no_package_to_install(monkeypatch, capsys):
    def without_fcntl(name):
        raise ModuleNotFoundError("No module named 'fcntl'", name="fcntl")

    monkeypatch.setattr("importlib.import_module", without_fcntl)
    assert main(["distill", "--help"]) == 2
    assert f"it needs Python's module fcntl, which {sys.platform} has not; use Linux." in capsys.readouterr().err


def test_every_extra_that_is_named_exists():
    """One of the name torchvision was advised, and there is none."""
    named = {}
    places = ["ftfast", "bench", "tests", "docs", "examples", "Makefile", "README.md", "pyproject.toml", "setup.py"]
    for path in (file for place in places for file in [ROOT / place, *(ROOT / place).rglob("*.*")] if file.is_file()):
        if path.suffix in ("", ".py", ".md", ".toml"):
            for extras in re.findall(r"(?:\bftfast|[\"' ]\.)\[([a-z][a-z, -]*)\]", path.read_text()):
                named.update({extra.strip(): path for extra in extras.split(",")})
    assert {"distill", "timm", "peers"} <= named.keys()
    extras = PROJECT["optional-dependencies"].keys()
    assert not {name: path for name, path in named.items() if name not in extras}


def test_models_of_a_library_that_is_missing_name_an_extra_that_brings_it(monkeypatch):
    from ftfast.distillation.models import libraries

    for library, extra in libraries.LIBRARIES.items():
        monkeypatch.setitem(sys.modules, library, None)
        with pytest.raises(ValueError, match=re.escape(f"pip install 'ftfast[{extra}]'")):
            libraries.check_name(f"{library}/resnet18")
        assert any(needed.startswith(library) for needed in PROJECT["optional-dependencies"][extra])


def test_the_tests_need_no_other_project():
    """A peer that asks for a newer torch kept the oldest one from being tested."""
    needed = " ".join(PROJECT["optional-dependencies"]["test"] + PROJECT["optional-dependencies"]["distill"])
    for package in ("torchdistill", "timm", "lightning", "accelerate", "mkdocs", "scikit-learn", "peers", "all"):
        assert package not in needed


def test_versions_are_tried_from_the_oldest_torch_on(monkeypatch, tmp_path):
    floor = versions.oldest_torch()
    assert f"torch>={floor}" in PROJECT["dependencies"]
    pairs = versions.choose_pairs([], [])
    assert pairs[0] == (versions.PYTHONS[0], floor)
    assert {pair.torch for pair in pairs[1:]} == {versions.NEWEST}
    assert versions.choose_pairs(["3.12"], ["2.11"]) == [("3.12", "2.11")]
    assert versions.Pair("3.12", "2.11").folder == ROOT / ".venv-py312-torch211"
    assert "no Python 9.9" in versions.why_not(versions.Pair("9.9", floor))
    assert all((ROOT / file).is_file() for file in (*versions.CORE, *versions.INTERPRETED))
    monkeypatch.setattr(versions, "why_not", lambda pair: "too little disk")
    assert [row.outcome for row in versions.test(pairs[0])] == ["skipped: too little disk"]
