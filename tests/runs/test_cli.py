"""The command line: what comes out where, and that bad input is one sentence on standard error and exit status 2."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import ftfast
from ftfast.backends.triton import interpreting
from ftfast.cli import COMMANDS, main
from ftfast.distillation.runtime import checkpoint
from ftfast.distillation.settings.run_settings import Settings
from tests.processes.fork_server import Popen
from tests.processes.launching import python

TINY = [
    "distill",
    "--data",
    "digits",
    "--methods",
    "none,ft",
    "--seeds",
    "1",
    "--teacher",
    "resnet8",
    "--teacher-channels",
    "4",
    "--teacher-epochs",
    "2",
    "--student-channels",
    "2",
    "--student-epochs",
    "3",  # after two, logits are ties within rounding, and what memory format decides is no accuracy
    "--student-images",
    "60",
    "--paraphraser-steps",
    "40",
    "--beta",
    "60",
    "--device",
    "cpu",
    "--dtype",
    "float32",
]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """A run from the command line, by a new interpreter, seen from outside."""
    folder = tmp_path_factory.mktemp("cli") / "run"
    return folder, python("-m", "ftfast", *TINY, "--output", str(folder), start=subprocess.Popen)


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The one sentence with which a command refuses its words."""
    try:
        status = main(words)
    except SystemExit as leaving:
        status = int(leaving.code or 0)
    captured = capsys.readouterr()
    assert status == 2
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("ftfast")
    assert ": error: " in captured.err
    assert "Traceback" not in captured.err
    return captured.err


def test_a_run_prints_its_table_on_stdout_and_quiet_lines_on_stderr(
    finished: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    folder, ended = finished
    assert ended.returncode == 0, ended.stderr
    results = json.loads((folder / "results.json").read_text())
    for name in ("none", "ft"):
        line = next(line for line in ended.stdout.splitlines() if line.split()[:1] == [name])
        assert f"{results['methods'][name]['mean']:.2f}" in line
    told, _, next_commands = ended.stdout.partition(f"Report: {folder / 'report.md'}\nNext:\n")
    assert told
    commands = [shlex.split(line) for line in next_commands.splitlines()]
    assert [Path(words[0]).name for words in commands] == ["tensorboard", "ftfast", "ftfast"]
    assert all(any(Path(word).is_relative_to(folder) and Path(word).exists() for word in words) for words in commands)
    assert {words[1] for words in commands[1:]} <= set(COMMANDS)
    lines = ended.stderr.splitlines()
    assert [line.split(":")[0] for line in lines if not line.startswith("warning")] == [
        "teacher",
        "paraphraser",
        "doctor",
        "none",
        "ft",
    ]
    assert "\x1b" not in ended.stderr + ended.stdout
    assert "\r" not in ended.stderr


def test_json_prints_the_results(
    finished: tuple[Path, subprocess.CompletedProcess[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _ = finished
    assert main([*TINY, "--output", str(folder), "--resume", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((folder / "results.json").read_text())


@pytest.mark.parametrize("kind", ["teacher", "students/ft/seed0"])
def test_evaluate_repeats_the_runs_accuracy(
    finished: tuple[Path, subprocess.CompletedProcess[str]], capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    folder, _ = finished
    assert main(["evaluate", str(folder / kind), "--data", "digits", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["accuracy"] == checkpoint.load(folder / kind).description["accuracy"]
    assert main(["evaluate", str(folder / kind)]) == 0
    printed = capsys.readouterr().out
    assert f"{found['accuracy']:.2f} % (top 5: " in printed
    assert " of 797 test images" in printed


def test_evaluate_refuses_what_is_no_classifier(
    finished: tuple[Path, subprocess.CompletedProcess[str]], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert "paraphraser" in refused(capsys, "evaluate", str(finished[0] / "paraphraser"))
    assert "no checkpoint folder" in refused(capsys, "evaluate", str(tmp_path))
    assert "data is 'cifar'" in refused(capsys, "evaluate", str(finished[0] / "teacher"), "--data", "cifar")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--methods", "ft,fsp"], "methods is 'fsp'; it takes none, kd, at, fitnet, ft, ft+kd, at+kd"),
        (["--data", "imagenet"], "data is 'imagenet'; it takes digits"),
        (["--student", "resnet10"], "resnet8, resnet14"),
        (["--seeds", "many"], "seeds is 'many'; it takes a whole number"),
        (["--seeds", "0"], "at least 1"),
        (["--beta", "-1"], "beta is -1"),
        (["--beta", "1,x"], "beta is '1,x'; it takes a number, or several separated by commas"),
        (["--learning-rate", "nan"], "learning_rate is nan"),
        (["--dtype", "float8"], "dtype is 'float8'; it takes auto, bfloat16, float16, float32"),
        (["--device", "tpu"], "device is 'tpu'; it takes auto, cpu, cuda"),
        (["--checkpoint-seconds", "soon"], "checkpoint_seconds is 'soon'"),
        (["--colour", "red"], "--colour"),
        (["--student-images", "20"], "at least 40"),
        (
            ["--seed", "99999999999999999999"],
            "seed is 99999999999999999999; it takes a number of at least 0 and at most",
        ),
        (["--beta", "1,2", "--alpha", "0.1,0.2,0.3"], "one value or equally many"),
    ],
)
def test_bad_settings_are_refused_before_anything_is_written(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, words: list[str], message: str
) -> None:
    assert message in refused(capsys, "distill", "--output", str(tmp_path / "run"), *words)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "message"),
    [("bogus", "backend is 'bogus'; it takes"), ("triton", 'backend "triton" cannot run')],
)
def test_a_backend_that_cannot_be_had_is_refused_before_anything_is_written(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, message: str
) -> None:
    if name == "triton" and interpreting():
        pytest.skip("Triton's interpreter runs on the CPU")
    monkeypatch.setenv("FTFAST_BACKEND", name)
    found = refused(capsys, *TINY, "--output", str(tmp_path / "run"))
    assert "FTFAST_BACKEND cannot be met" in found
    assert message in found
    assert not (tmp_path / "run").exists()


def test_a_name_that_is_too_long_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert "File name too long." in refused(capsys, *TINY, "--output", str(tmp_path / ("a" * 300)))


def test_a_folder_where_a_file_should_be_is_named(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, finished: tuple[Path, subprocess.CompletedProcess[str]]
) -> None:
    shutil.copytree(finished[0], tmp_path / "run")
    (tmp_path / "run/results.json").unlink()
    (tmp_path / "run/results.json").mkdir()
    assert main([*TINY, "--output", str(tmp_path / "run"), "--resume"]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("ftfast distill: error: ")
    assert last.endswith("results.json: Is a directory.")


@pytest.mark.process
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_full_disk_under_standard_output_is_one_sentence() -> None:
    with open("/dev/full", "w") as full:
        ended = python("-m", "ftfast", "distill", "--print-settings", stdout=full)
    assert ended.returncode == 2
    assert ended.stderr == "ftfast distill: error: No space left on device.\n"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_full_disk_under_standard_error_ends_nothing() -> None:
    """A training whose log lay on a full disk ended there, with the status of a traceback."""
    with open("/dev/full", "w") as full:
        ended = python("-m", "ftfast", "distill", "--preset", "nonsense", stderr=full)
    assert ended.returncode == 2  # nothing can be said but this


def test_a_model_that_memory_does_not_hold_is_one_sentence(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    words = [*TINY, "--output", str(tmp_path / "run"), "--teacher-channels", "4000000"]
    assert "the memory does not suffice" in refused(capsys, *words)


@pytest.mark.process
def test_resuming_a_run_that_is_not_there_says_that_it_starts_anew(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    ended = python("-m", "ftfast", *TINY, "--methods", "none", "--resume", "--output", str(folder))
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr.splitlines()[0] == f"{folder} holds no run yet: --resume starts a new run"


@pytest.mark.process
def test_forced_colours_put_no_bars_into_a_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    ended = python("-m", "ftfast", *TINY, "--methods", "none", "--output", str(tmp_path / "run"))
    assert ended.returncode == 0, ended.stderr
    assert "images/s" not in ended.stderr
    assert "\r" not in ended.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_a_missing_device_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    message = refused(capsys, "distill", "--output", str(tmp_path / "run"), "--device", "cuda")
    assert "--device cpu" in message


@pytest.mark.parametrize("form", ["nothing", "cut", "other", "code", "other folder"])
def test_a_bad_teacher_checkpoint_is_refused_before_anything_is_written(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    finished: tuple[Path, subprocess.CompletedProcess[str]],
    form: str,
) -> None:
    path = tmp_path / "teacher.pt"
    tensors = checkpoint.load(finished[0] / "teacher").tensors
    words = list(TINY)
    if form == "cut":
        torch.save(tensors, path)
        path.write_bytes(path.read_bytes()[:-100])
    elif form == "other":
        torch.save({"weight": torch.zeros(1)}, path)
    elif form == "code":
        torch.save({"model": print}, path)
    elif form == "other folder":
        path = finished[0] / "teacher"
        words[words.index("--teacher-channels") + 1] = "6"
    expected = {
        "nothing": "cannot be read",
        "cut": "cut short",
        "other": "another model than a resnet8",
        "code": "may hold code",
        "other folder": "a resnet8 with 4 channels",
    }
    message = refused(capsys, *words, "--output", str(tmp_path / "run"), "--teacher-checkpoint", str(path))
    assert expected[form] in message
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_of_another_paraphraser_is_refused_before_anything_is_written(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, finished: tuple[Path, subprocess.CompletedProcess[str]]
) -> None:
    words = [*TINY, "--output", str(tmp_path / "run"), "--paraphraser-checkpoint"]
    assert "is the checkpoint of a teacher" in refused(capsys, *words, str(finished[0] / "teacher"))
    of_another_rate = [*words, str(finished[0] / "paraphraser"), "--rate", "0.25"]
    assert "at a rate of 0.25" in refused(capsys, *of_another_rate)
    assert "cannot be read" in refused(capsys, *words, str(tmp_path / "nothing.pt"))
    assert not (tmp_path / "run").exists()


def test_output_folders_that_cannot_be_used_are_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, finished: tuple[Path, subprocess.CompletedProcess[str]]
) -> None:
    (tmp_path / "file").write_text("mine")
    assert "is a file" in refused(capsys, *TINY, "--output", str(tmp_path / "file" / "run"))
    assert "is a file" in refused(capsys, *TINY, "--output", str(tmp_path / "file"))
    assert (tmp_path / "file").read_text() == "mine"
    assert "--resume" in refused(capsys, *TINY, "--output", str(finished[0]))
    assert "output is ''; it takes a folder's path" in refused(capsys, *TINY, "--output", "")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    assert "no permission" in refused(capsys, *TINY, "--output", str(tmp_path / "run"))


def test_a_file_system_that_is_read_only_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert "cannot be written" in refused(capsys, *TINY, "--output", "/proc/run")


def test_printed_settings_are_resolved_and_can_be_read_back(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["distill", "--print-settings", "--student-epochs", "7", "--output", str(tmp_path / "run")]) == 0
    settings = Settings.from_json(json.loads(capsys.readouterr().out))
    assert settings == settings.resolved()
    assert settings.student_epochs == 7
    assert "auto" not in (settings.device, settings.dtype)
    assert 125 in settings.beta
    assert not (tmp_path / "run").exists()


@pytest.mark.process
@pytest.mark.parametrize(
    ("number", "moment"),
    [
        pytest.param(signal.SIGINT, "tensorboard/students/none/seed0", id="Ctrl-C-in-a-training"),
        pytest.param(signal.SIGTERM, "settings.json", id="SIGTERM-before-any"),
        pytest.param(signal.SIGUSR1, "tensorboard/teacher", id="SIGUSR1-in-a-training"),
    ],
)
def test_an_interruption_says_how_to_go_on(tmp_path: Path, number: signal.Signals, moment: str) -> None:
    folder = tmp_path / "run"
    process = Popen(
        [sys.executable, "-m", "ftfast", *TINY, "--output", str(folder), "--student-epochs", "5000"],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 200
    while not (folder / moment).exists() and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(number)
    out, err = process.communicate(timeout=200)
    assert process.returncode == 128 + number
    assert out == ""
    last = err.splitlines()[-1]
    assert last == f"ftfast distill: interrupted: run the same command with --resume to continue {folder}."
    assert "Traceback" not in err


def test_version_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as leaving:
        main(["--version"])
    assert leaving.value.code == 0
    assert capsys.readouterr().out.strip() == f"ftfast {ftfast.__version__}"
    assert main([]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in COMMANDS)


def test_an_unknown_command_is_refused_with_the_commands_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    message = refused(capsys, "distil")
    assert all(name in message for name in COMMANDS)


def test_help_imports_no_torch() -> None:
    code = "import sys; from ftfast.cli import main; main([]); assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60).returncode == 0


def test_a_missing_package_is_named_with_its_remedy(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.import_module", _without_rich)
    assert main(["distill"]) == 2
    assert "it needs the package rich; pip install 'ftfast[distill]'." in capsys.readouterr().err


def _without_rich(name: str) -> None:
    raise ModuleNotFoundError("No module named 'rich'", name="rich")


def test_a_run_without_tensorboard_s_files_does_not_advise_to_look_at_them(
    finished: tuple[Path, subprocess.CompletedProcess[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It named a folder that is not there."""
    folder = shutil.copytree(finished[0], tmp_path / "run", ignore=shutil.ignore_patterns("tensorboard"))
    assert main([*TINY, "--output", str(folder), "--resume", "--track", ""]) == 0
    _, _, next_commands = capsys.readouterr().out.partition("Next:\n")
    assert [line.split()[1] for line in next_commands.splitlines()] == ["evaluate", "export"]
