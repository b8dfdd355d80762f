"""A run that is killed again and again ends in the same bits as one that is left alone."""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.processes.fork_server import Popen
from tests.processes.launching import ROOT

KILLS, AFTER_FIRST, IN_WRITING = 20, 15, 5
RECIPE = [
    *("distill", "--data", "digits", "--methods", "ft", "--seeds", "1", "--beta", "60", "--student", "resnet8"),
    *("--teacher", "resnet8", "--teacher-channels", "2", "--teacher-epochs", "1", "--paraphraser-steps", "100"),
    *("--paraphraser-optimiser", "adam", "--paraphraser-learning-rate", "3e-3"),
    *("--student-channels", "2", "--student-epochs", "60", "--student-images", "200", "--device", "cpu"),
    *("--dtype", "float32", "--threads", "1", "--checkpoint-seconds", "0", "--resume"),
]


def start(folder: Path) -> "subprocess.Popen[bytes]":
    words = [sys.executable, "-m", "ftfast", *RECIPE, "--output", str(folder)]
    return Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, cwd=ROOT)


def on_the_way(folder: Path) -> list[str]:
    """What lies among the checkpoints on the way, each by the folder of its training; the run changes it meanwhile."""
    found: list[str] = []
    for training in ("teacher", "paraphraser", "students/ft/seed0"):
        with contextlib.suppress(OSError):
            found += [f"{training}/{name}" for name in os.listdir(f"{folder}/{training}.unfinished")]
    return found


def checkpoints(folder: Path) -> set[str]:
    return {path for path in on_the_way(folder) if "/." not in path}


def is_writing(folder: Path) -> bool:
    return any(path.endswith(".partial") for path in on_the_way(folder))


def kill(process: "subprocess.Popen[bytes]", folder: Path, *, in_writing: bool, draw: random.Random) -> bool:
    """At a moment drawn at random after a new checkpoint; whether that was while one was being written."""
    before = checkpoints(folder)
    deadline = time.monotonic() + 200
    while not checkpoints(folder) - before:
        time.sleep(1e-3)
        assert time.monotonic() < deadline
        if process.poll() is not None:
            return False
    time.sleep(draw.uniform(0, 0.1))
    while in_writing and not is_writing(folder) and process.poll() is None:
        pass
    process.send_signal(signal.SIGKILL)
    process.wait()
    return is_writing(folder)


def what_counts(folder: Path) -> dict[str, Any]:
    results = json.loads((folder / "results.json").read_text())
    student = results["methods"]["ft"]["students"][0]
    return {name: student[name] for name in ("accuracy",)} | {
        "history": [{name: epoch[name] for name in ("losses", "accuracy")} for epoch in student["history"]]
    }


@pytest.mark.slow
def test_twenty_kills_change_no_bit(tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert start(whole).wait(200) == 0
    draw = random.Random(0)
    kills = after_first = in_writing = 0
    while kills < KILLS:
        process = start(killed)
        has_first = bool(checkpoints(killed))
        in_writing += kill(process, killed, in_writing=in_writing < IN_WRITING, draw=draw)
        assert process.returncode == -signal.SIGKILL, "the run ended before its twenty kills"
        kills += 1
        after_first += has_first or bool(checkpoints(killed))
    assert after_first >= AFTER_FIRST
    assert in_writing >= IN_WRITING
    assert start(killed).wait(200) == 0
    assert what_counts(killed) == what_counts(whole)
    for model in ("teacher", "students/ft/seed0"):
        files = [folder / model / "model.safetensors" for folder in (whole, killed)]
        assert files[0].read_bytes() == files[1].read_bytes(), model
    assert not list(killed.glob("**/*.unfinished"))
    assert not list(killed.glob("**/.*.partial"))
