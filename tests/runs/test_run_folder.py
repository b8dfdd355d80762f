"""Who may write to a run folder, and with which settings a run in it goes on."""

import fcntl
import json
import multiprocessing
import os
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from ftfast.distillation.phases.run_folder import check_run_folder, is_of_one, open_run_folder
from ftfast.distillation.runtime import output_folder, torchrun
from ftfast.distillation.runtime.signals import Interrupted
from ftfast.errors import DistillError, LostProcessError, RunFolderError, SettingsError
from tests.runs.test_distill_run import SMALL

SETTINGS = SMALL.resolved()


def is_locked(path: Path) -> bool:
    handle = os.open(path / ".lock", os.O_RDWR)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(handle)
    return False


def test_a_process_that_was_forked_off_does_not_hold_the_folder(tmp_path: Path) -> None:
    """Readers live for some seconds after a kill, and a restart was refused."""
    forking = multiprocessing.get_context("fork")
    begun, end = forking.Event(), forking.Event()

    def read() -> None:
        begun.set()
        end.wait(60)

    with open_run_folder(tmp_path, SETTINGS, resume=False):
        reader = forking.Process(target=read)
        reader.start()
        assert begun.wait(60)
        assert is_locked(tmp_path)
    assert not is_locked(tmp_path)
    end.set()
    reader.join()


def test_a_run_that_is_gone_on_with_waits_for_the_one_before_to_end(tmp_path: Path) -> None:
    with open_run_folder(tmp_path, SETTINGS, resume=False):
        pass
    handle = os.open(tmp_path / ".lock", os.O_RDWR)
    fcntl.flock(handle, fcntl.LOCK_EX)
    timer = threading.Timer(0.5, os.close, (handle,))
    timer.start()
    with open_run_folder(tmp_path, SETTINGS, resume=True):
        assert is_locked(tmp_path)
    timer.join()


def test_a_run_that_goes_on_beside_another_is_refused_in_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(output_folder, "LOCK_SECONDS", 0.2)
    with (
        open_run_folder(tmp_path, SETTINGS, resume=False),
        pytest.raises(RunFolderError, match="another process is writing to it"),
        open_run_folder(tmp_path, SETTINGS, resume=True),
    ):
        pass


def test_a_folder_knows_by_what_its_run_was_begun(tmp_path: Path) -> None:
    assert not is_of_one(tmp_path, [b"one"])
    with open_run_folder(tmp_path, SETTINGS, resume=False, agents=[b"one", b"two"]):
        pass
    assert is_of_one(tmp_path, [b"three", b"two"])
    assert not is_of_one(tmp_path, [b"three"])
    assert not is_of_one(tmp_path, [])
    (tmp_path / ".launch").write_text("damaged")
    assert not is_of_one(tmp_path, [b"one"])


def test_a_kill_before_the_settings_leaves_a_folder_as_good_as_empty(tmp_path: Path) -> None:
    (tmp_path / ".launch").write_text("[]")
    check_run_folder(tmp_path, SETTINGS, resume=False)


def test_what_changes_no_result_may_be_otherwise_when_a_run_goes_on(tmp_path: Path) -> None:
    """A job that is started again has another scratch folder, and under torchrun another number of threads."""
    (tmp_path / "settings.json").write_text(json.dumps(SETTINGS.to_json()))
    check_run_folder(tmp_path, replace(SETTINGS, threads=7, data_dir="/scratch/job2", download=True), resume=True)
    with pytest.raises(SettingsError, match="student_epochs is 9"):
        check_run_folder(tmp_path, replace(SETTINGS, student_epochs=9), resume=True)


class Store:
    """A dictionary in the place of torchrun's store."""

    def __init__(self) -> None:
        self.kept: dict[str, str] = {}

    def check(self, names: list[str]) -> bool:
        return all(name in self.kept for name in names)

    def get(self, name: str) -> str:
        return self.kept[name]

    def compare_set(self, name: str, expected: str, value: str) -> None:
        assert expected == ""
        self.kept.setdefault(name, value)

    def add(self, name: str, count: int) -> int:
        self.kept[name] = str(int(self.kept.get(name, "0")) + count)
        return int(self.kept[name])


@pytest.mark.parametrize(
    ("end", "is_kept"),
    [
        (SettingsError("batch_size is 3."), True),
        (Interrupted(10, "go on with --resume"), True),
        (Interrupted(2, "go on with --resume"), True),
        (Interrupted(15, "go on with --resume"), False),  # which torchrun sends before it starts all anew
        (LostProcessError("another process is gone."), False),
    ],
)
def test_a_restart_ends_as_the_run_had_ended_for_good(
    monkeypatch: pytest.MonkeyPatch, end: DistillError | Interrupted, is_kept: bool
) -> None:
    store = Store()
    monkeypatch.setattr(torchrun, "_reached", lambda: store)
    torchrun.end_again()
    torchrun.remember(end)
    if not is_kept:
        torchrun.end_again()
        return
    torchrun.remember(SettingsError("what came later."))
    with pytest.raises((DistillError, Interrupted)) as caught:
        torchrun.end_again()
    assert str(caught.value) == str(end)
    assert getattr(caught.value, "status", 2) == getattr(end, "status", 2)


def test_a_sentence_is_said_by_the_first_that_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store()
    monkeypatch.setattr(torchrun, "_reached", lambda: store)
    assert [torchrun.is_first_to_say(sentence) for sentence in ("a", "b", "a")] == [True, True, False]
    monkeypatch.setattr(torchrun, "_reached", lambda: None)
    assert torchrun.is_first_to_say("a") is None
