"""A build that is ended at any moment goes on to the same bytes, and is never taken for a finished store before."""

import dataclasses
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from ftfast.cli import main
from ftfast.distillation.phases.run_folder import RunFolder
from ftfast.distillation.store import build, shard_files
from ftfast.distillation.store import header as headers
from ftfast.distillation.store.build import Request, build_store
from ftfast.distillation.store.read import Store
from ftfast.errors import StoreError
from tests.factor_store.store_folder import REQUEST, contents, make_run, make_store
from tests.processes.fork_server import Popen
from tests.processes.launching import ROOT, finished, torchrun

MANY = Request(views=3, logits=True, batch_size=10, shard_images=10)  # 100 shards
WORDS = ["--views", "3", "--logits", "--batch-size", "10", "--shard-images", "10", "--device", "cpu"]


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "run")


def built_shards(store: Path) -> int:
    return len(list(store.glob("shard-*"))) if store.exists() else 0


def start(run_folder: Path, store: Path) -> "subprocess.Popen[bytes]":
    words = [sys.executable, "-m", "ftfast", "store", "build", str(run_folder), str(store), *WORDS, "--resume"]
    return Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, cwd=ROOT)


@pytest.mark.slow
def test_a_killed_build_goes_on_to_the_same_bytes(run_folder: Path, tmp_path: Path) -> None:
    whole = contents(make_store(run_folder, tmp_path / "whole", MANY))
    kills, draw, killed = 6, random.Random(0), tmp_path / "killed"
    for kill in range(kills):
        process = start(run_folder, killed)
        wanted = min(99, built_shards(killed) + draw.randint(0 if kill else 1, 90 // kills))
        while built_shards(killed) < wanted and process.poll() is None:
            time.sleep(1e-3)
        time.sleep(draw.uniform(0, 0.005))
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert process.returncode == -signal.SIGKILL, process.stderr
        if built_shards(killed):
            with pytest.raises(StoreError, match="is not finished; go on with ftfast store build"):
                Store(killed)
    process = start(run_folder, killed)
    assert process.wait(100) == 0
    assert contents(killed) == whole


@pytest.mark.parametrize("shard", [0, 4, 9])
def test_an_error_at_any_shard_leaves_a_store_that_goes_on(
    run_folder: Path, tmp_path: Path, shard: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = contents(make_store(run_folder, tmp_path / "whole"))
    write = shard_files.write_shard

    def failing(path: Path, tensors: object) -> None:
        if path == shard_files.shard_path(tmp_path / "store", shard):
            raise OSError(28, "No space left on device", str(path))
        write(path, tensors)  # type: ignore[arg-type]

    monkeypatch.setattr(shard_files, "write_shard", failing)
    with pytest.raises(OSError, match="No space left"):
        make_store(run_folder, tmp_path / "store")
    monkeypatch.undo()
    assert main(["store", "info", str(tmp_path / "store")]) == 0
    assert f"not finished: {shard} of 10 shards are there" in capsys.readouterr().out
    assert main(["distill", "--store", str(tmp_path / "store"), "--output", str(tmp_path / "run")]) == 2
    assert "is not finished" in capsys.readouterr().err
    with pytest.raises(StoreError, match="holds a store that is not finished; go on with --resume"):
        make_store(run_folder, tmp_path / "store")
    make_store(run_folder, tmp_path / "store", resume=True)
    assert contents(tmp_path / "store") == whole


def test_a_shard_that_a_crash_cut_short_is_made_anew(
    run_folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    store = make_store(run_folder, tmp_path / "store")
    whole = contents(store)
    headers.write(store, dataclasses.replace(headers.read(store), shards=None))
    path = shard_files.shard_path(store, 5)
    path.write_bytes(path.read_bytes()[:-100])
    (store / ".shard-00007.safetensors.partial").write_bytes(b"left over")
    make_store(run_folder, store, resume=True)
    assert "shard-00005.safetensors is cut short" in capfd.readouterr().err
    assert contents(store) == whole


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"views": 2}, "views is 2, and the store"),
        ({"dtype": "float16"}, "dtype is 'float16', and the store"),
        ({"logits": False}, "classes is 0, and the store"),
        ({"seed": 3}, "seed is 3, and the store"),
        ({"shard_images": 50}, "shard_images is 50, and the store"),
    ],
)
def test_another_build_is_not_gone_on_with(
    run_folder: Path, tmp_path: Path, changes: dict[str, object], field: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "_write", lambda *_: (_ for _ in ()).throw(StoreError("ended")))
    with pytest.raises(StoreError, match="ended"):
        make_store(run_folder, tmp_path / "store")
    with pytest.raises(StoreError, match=field):
        make_store(run_folder, tmp_path / "store", dataclasses.replace(REQUEST, **changes), resume=True)  # type: ignore[arg-type]


def test_another_teacher_is_not_gone_on_with(run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ftfast.distillation.runtime import checkpoint

    monkeypatch.setattr(build, "_write", lambda *_: (_ for _ in ()).throw(StoreError("ended")))
    with pytest.raises(StoreError, match="ended"):
        make_store(run_folder, tmp_path / "store")
    read = build.read_run

    def others(folder: Path) -> tuple[checkpoint.Checkpoint, checkpoint.Checkpoint]:
        teacher, paraphraser = read(folder)
        name = next(iter(paraphraser.tensors))
        return teacher, dataclasses.replace(
            paraphraser, tensors={**paraphraser.tensors, name: paraphraser.tensors[name] * 2}
        )

    monkeypatch.setattr(build, "read_run", others)
    with pytest.raises(StoreError, match="paraphraser differs from what the store"):
        make_store(run_folder, tmp_path / "store", resume=True)


def test_a_finished_store_is_left_alone(run_folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    store = make_store(run_folder, tmp_path / "store")
    times = {path: path.stat().st_mtime_ns for path in store.rglob("*")}
    with pytest.raises(StoreError, match="holds a finished store; choose another name"):
        make_store(run_folder, store)
    make_store(run_folder, store, resume=True)
    assert "is finished already" in capfd.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in store.rglob("*")} == times


def test_other_files_are_left_alone(run_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    for resume in (False, True):
        with pytest.raises(StoreError, match="holds other files"):
            make_store(run_folder, tmp_path, resume=resume)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_two_builds_do_not_write_to_one_store(
    run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, refused = build._write, []

    def another_meanwhile(*given: object) -> None:
        monkeypatch.setattr(build, "_write", write)
        try:
            make_store(run_folder, tmp_path / "store", resume=True)
        except StoreError as error:
            refused.append(str(error))
        write(*given)  # type: ignore[arg-type]

    monkeypatch.setattr(build, "_write", another_meanwhile)
    make_store(run_folder, tmp_path / "store")
    assert len(refused) == 1
    assert "another process is building" in refused[0]
    Store(tmp_path / "store")


def test_a_run_without_a_paraphraser_is_refused(run_folder: Path, tmp_path: Path) -> None:
    paraphraser = RunFolder(run_folder).paraphraser
    paraphraser.rename(tmp_path / "aside")
    try:
        with pytest.raises(StoreError, match="has no trained paraphraser"):
            build_store(run_folder, tmp_path / "store", REQUEST, device="cpu")
    finally:
        (tmp_path / "aside").rename(paraphraser)


@pytest.mark.process
def test_two_processes_build_the_same_bytes(run_folder: Path, tmp_path: Path) -> None:
    whole = make_store(run_folder, tmp_path / "whole", MANY)
    words = ["-m", "ftfast", "store", "build", str(run_folder), str(tmp_path / "shared"), *WORDS]
    status, out, errors = finished(torchrun(2, *words))
    assert status == 0, errors
    assert out.count("Store:") == 1
    assert contents(tmp_path / "shared") == contents(whole)


@pytest.mark.process
def test_a_signal_ends_a_build_with_advice(run_folder: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    process = start(run_folder, store)
    while built_shards(store) < 2 and process.poll() is None:
        time.sleep(1e-3)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=200)
    assert process.returncode == 128 + signal.SIGTERM
    assert f"--resume to go on with {store}" in errors.decode()
    assert "Traceback" not in errors.decode()
    assert os.path.exists(store / headers.FILE)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("shard writer")]
