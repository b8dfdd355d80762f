"""Checkpoints on the way: the last few stay, a damaged newest one is passed over, a full disk costs nothing else."""

import errno
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from ftfast.distillation.runtime import checkpoint
from ftfast.distillation.runtime.checkpoint import Checkpoint
from ftfast.distillation.runtime.snapshots import Snapshots
from ftfast.errors import CheckpointError


def content(value: float) -> Checkpoint:
    state = {"optimiser": [torch.full((3,), value)], "steps": value}
    return Checkpoint({"weight": torch.full((4, 4), value)}, state, {"kind": "student"})


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def test_the_last_few_stay_and_the_newest_is_found(tmp_path: Path) -> None:
    with Snapshots(tmp_path / "way", kept=3) as snapshots:
        assert snapshots.newest() is None
        for number in range(6):
            snapshots.save(f"step{number}", content(number))
    assert names(tmp_path / "way") == ["step3", "step4", "step5"]
    with Snapshots(tmp_path / "way") as snapshots:
        found = snapshots.newest()
    assert found is not None
    assert found[1].state["steps"] == 5


def damage(folder: Path, kind: str) -> None:
    file = folder / "state.pt"
    whole = bytearray(file.read_bytes())
    if kind == "flipped byte":
        whole[len(whole) // 2] ^= 1
        file.write_bytes(whole)
    elif kind == "cut":
        file.write_bytes(whole[:-5])
    else:
        file.unlink()


@pytest.mark.parametrize("kind", ["flipped byte", "cut", "missing"])
def test_a_damaged_newest_one_is_told_of_and_the_one_before_taken(tmp_path: Path, kind: str) -> None:
    said: list[str] = []
    with Snapshots(tmp_path, say=said.append) as snapshots:
        for number in range(2):
            snapshots.save(f"step{number}", content(number))
    damage(tmp_path / "step1", kind)
    (tmp_path / ".step2.partial").mkdir()  # what a kill leaves of one that was being written
    with Snapshots(tmp_path, say=said.append) as snapshots:
        found = snapshots.newest()
    assert found is not None
    assert found[1].state["steps"] == 0
    assert len(said) == 1
    assert said[0].startswith("warning:")
    assert said[0].endswith("going on from the checkpoint before it, step0")
    assert names(tmp_path) == ["step0"]


def test_where_all_are_damaged_nothing_is_removed(tmp_path: Path) -> None:
    with Snapshots(tmp_path) as snapshots:
        for number in range(2):
            snapshots.save(f"step{number}", content(number))
        snapshots.is_idle(wait=True)
        for number in range(2):
            damage(tmp_path / f"step{number}", "cut")
        with pytest.raises(CheckpointError, match=r"no checkpoint that is whole.*remove it to train"):
            snapshots.newest()
    assert names(tmp_path) == ["step0", "step1"]


def test_what_is_written_is_what_was_there_at_the_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The training goes on, in place, while a slow disk takes the copy."""
    may_write, write = threading.Event(), checkpoint.save

    def slowly(folder: Path, found: Checkpoint) -> None:
        assert may_write.wait(10)
        write(folder, found)

    monkeypatch.setattr(checkpoint, "save", slowly)
    changing = content(1.0)
    with Snapshots(tmp_path) as snapshots:
        snapshots.save("step1", changing)
        assert not snapshots.is_idle()
        changing.tensors["weight"].fill_(7)
        changing.state["optimiser"][0].fill_(7)
        may_write.set()
    kept = checkpoint.load(tmp_path / "step1")
    assert torch.equal(kept.tensors["weight"], torch.ones(4, 4))
    assert torch.equal(kept.state["optimiser"][0], torch.ones(3))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_not_kept(tmp_path: Path, bad: float) -> None:
    with Snapshots(tmp_path) as snapshots:
        snapshots.save("step1", content(1.0))
        snapshots.save("step2", content(bad))
    assert names(tmp_path) == ["step1"]


class Disk:
    """Refuses to write checkpoints while more than ``room`` of them lie there."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.room = 100
        self._folder, self._write = folder, checkpoint.save
        monkeypatch.setattr(checkpoint, "save", self._save)

    def _save(self, folder: Path, found: Checkpoint) -> None:
        if self._folder.is_dir() and len(names(self._folder)) >= self.room:
            raise OSError(errno.ENOSPC, "No space left on device", str(folder))
        self._write(folder, found)


def test_a_disk_that_fills_costs_older_checkpoints_first_and_then_is_told_of_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk, said = Disk(tmp_path, monkeypatch), []  # type: ignore[var-annotated]
    with Snapshots(tmp_path, kept=3, say=said.append) as snapshots:
        for number in range(3):
            snapshots.save(f"step{number}", content(number))
        snapshots.is_idle(wait=True)
        disk.room = 2
        snapshots.save("step3", content(3))
        snapshots.is_idle(wait=True)
        assert names(tmp_path) == ["step2", "step3"]
        disk.room = 0
        for number in (4, 5):
            snapshots.save(f"step{number}", content(number))
            snapshots.is_idle(wait=True)
        assert names(tmp_path) == ["step3"]
    assert said == [
        f"warning: the checkpoint {tmp_path / 'step4'} cannot be written: No space left on device; step3 stands"
    ]


def test_an_error_that_is_no_disks_is_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise ValueError("a bug")

    monkeypatch.setattr(checkpoint, "save", broken)
    with pytest.raises(ValueError, match="a bug"), Snapshots(tmp_path) as snapshots:
        snapshots.save("step1", content(1))
