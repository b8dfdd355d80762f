"""Runs that torchrun starts: told to stop, refused, killed, joined by another machine, gone on with by fewer."""

import os
import signal
import socket
from pathlib import Path

import pytest

from ftfast.distillation.runtime.torchrun import is_first_to_say
from tests.photographs.photograph_folder import make_folder
from tests.photographs.test_photograph_runs import RECIPE
from tests.processes.launching import ROOT, finished, python, results_of, torchrun, wait_for, wait_for_end, workers_of
from tests.processes.test_processes import TINY

LONGER = [*TINY, "--student-epochs", "40"]
HANDLED = ("--signals-to-handle", "SIGTERM,SIGINT,SIGUSR1")
STUDENT = Path("students") / "ft" / "seed0"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "options", "status", "resumed_by"),
    [
        pytest.param(signal.SIGTERM, (), 1, 2, id="SIGTERM"),
        pytest.param(signal.SIGUSR1, HANDLED, 1, 1, id="SIGUSR1"),
        pytest.param(signal.SIGUSR1, (), -signal.SIGUSR1, 2, id="SIGUSR1-that-torchrun-does-not-handle"),
    ],
)
def test_a_signal_to_torchrun_saves_leaves_no_process_and_the_run_goes_on(
    tmp_path: Path, number: signal.Signals, options: tuple[str, ...], status: int, resumed_by: int
) -> None:
    """One of two processes goes on alone where that is wanted, with the number of threads that is its own."""
    words = [*LONGER, "--threads", "0", "--output", str(tmp_path), "--checkpoint-seconds", "1e9"]
    process = torchrun(2, "-m", "ftfast", *words, options=("--standalone", *options))
    wait_for(tmp_path / "tensorboard" / STUDENT, process)
    workers = list(workers_of(process.pid).values())
    process.send_signal(number)
    found, _, errors = finished(process)
    assert found == status, errors
    if status == 1:  # torchrun has waited for them
        assert not [worker for worker in workers if Path(f"/proc/{worker}").exists()]
    advice = f"interrupted: run the same command with --resume to continue {tmp_path}."
    assert errors.count(advice) == 1, errors
    for worker in workers:
        wait_for_end(worker)
    assert len(list((tmp_path / STUDENT).with_name("seed0.unfinished").iterdir())) == 1
    words += ["--resume"]
    if resumed_by == 1:
        done = python("-m", "ftfast", *words)
        assert done.returncode == 0, done.stderr
    else:
        found, _, errors = finished(torchrun(resumed_by, "-m", "ftfast", *words))
        assert found == 0, errors
    history = results_of(tmp_path)["methods"]["ft"]["students"][0]["history"]
    assert [epoch["epoch"] for epoch in history] == list(range(1, 41))


@pytest.mark.slow
def test_a_process_told_to_stop_is_not_started_to_train_again(tmp_path: Path) -> None:
    process = torchrun(2, "-m", "ftfast", *LONGER, "--output", str(tmp_path), restarts=1)
    wait_for(tmp_path / "tensorboard" / STUDENT, process)
    os.kill(workers_of(process.pid)[1], signal.SIGUSR1)
    status, _, errors = finished(process)
    assert status == 1
    assert errors.count("interrupted: run the same command with --resume") == 2, errors  # by each of two starts
    assert "exitcode  : 138" in errors
    assert errors.count("teacher: resnet8,") == 1
    assert not (tmp_path / STUDENT).exists()


@pytest.mark.slow
def test_a_run_that_was_refused_is_not_gone_on_with_by_a_restart(tmp_path: Path) -> None:
    """A restart resumes, and so went on with the run of somebody else that the first start had refused."""
    printed = python("-m", "ftfast", *TINY, "--print-settings")
    assert printed.returncode == 0, printed.stderr
    (tmp_path / "settings.json").write_text(printed.stdout)
    status, _, errors = finished(torchrun(2, "-m", "ftfast", *TINY, "--output", str(tmp_path), restarts=1))
    assert status == 1
    assert errors.count("holds a run already") == 2, errors
    assert not (tmp_path / "teacher").exists()


@pytest.mark.process
@pytest.mark.parametrize("refused", ["0", "1"])
def test_what_one_process_alone_refuses_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: str) -> None:
    """Those of another rank than 0 said nothing."""
    monkeypatch.setenv("REFUSED", refused)
    worker = str(ROOT / "tests" / "processes" / "refusing_worker.py")
    status, _, errors = finished(torchrun(2, worker, *TINY, "--output", str(tmp_path)))
    assert status == 1
    assert errors.count("the images of this machine cannot be read.") == 1, errors


def test_a_sentence_with_a_name_that_is_not_utf_8_is_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    said: dict[str, int] = {}

    class Store:
        def add(self, name: str, count: int) -> int:
            said[name] = said.get(name, 0) + count
            return said[name]

    monkeypatch.setattr("ftfast.distillation.runtime.torchrun." + "_reached", Store)
    assert [is_first_to_say(os.fsdecode(name)) for name in (b"\xff", b"\xfe", b"\xff")] == [True, True, False]


@pytest.mark.slow
def test_a_first_process_that_is_killed_leaves_its_folder_to_the_next_though_it_had_readers(tmp_path: Path) -> None:
    """They held the folder for seconds after it, and the restart was refused."""
    make_folder(tmp_path / "images", classes=20, train=240, val=60)
    output = tmp_path / "run"
    words = [*RECIPE, "--data-dir", str(tmp_path / "images"), "--output", str(output), "--checkpoint-seconds", "0"]
    process = torchrun(2, "-m", "ftfast", *words, restarts=1)
    wait_for(output / "students" / "ft" / "seed0.unfinished", process)
    os.kill(workers_of(process.pid)[0], signal.SIGKILL)
    status, _, errors = finished(process)
    assert status == 0, errors
    assert results_of(output)["hardware"]["processes"] == 2


def at_port(nodes: str) -> list[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    meeting = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}", "--rdzv-id", "one"]
    return [*meeting, "--local-addr", "127.0.0.1", "--nnodes", nodes]


@pytest.mark.slow
def test_two_torchruns_train_together(tmp_path: Path) -> None:
    options = at_port("2")
    both = [torchrun(1, "-m", "ftfast", *TINY, "--output", str(tmp_path), options=options) for _ in range(2)]
    ends = [finished(process) for process in both]
    assert [status for status, *_ in ends] == [0, 0], ends
    assert sum("Report:" in out for _, out, _ in ends) == 1
    assert results_of(tmp_path)["hardware"]["processes"] == 2


@pytest.mark.slow
def test_a_run_goes_on_when_another_machine_joins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torchrun starts all anew then and its count of restarts stays 0, so the folder was refused."""
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")  # without it the one that joins finds nobody
    options = at_port("1:2")
    words = [*TINY, "--student-epochs", "200", "--output", str(tmp_path), "--checkpoint-seconds", "0.2"]
    first = torchrun(1, "-m", "ftfast", *words, options=options)
    wait_for((tmp_path / STUDENT).with_name("seed0.unfinished"), first)
    second = torchrun(1, "-m", "ftfast", *words, options=options)
    ends = [finished(process) for process in (first, second)]
    assert [status for status, *_ in ends] == [0, 0], ends
    assert results_of(tmp_path)["hardware"]["processes"] == 2
