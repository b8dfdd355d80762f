"""Starting a run as torchrun does, and finding its processes."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def torchrun(
    processes: int, *command: str, restarts: int = 0, options: Sequence[str] = ("--standalone",)
) -> subprocess.Popen[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", *options, "--max-restarts", str(restarts)]
    return subprocess.Popen(
        [*launcher, "--nproc-per-node", str(processes), *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        cwd=ROOT,
    )


def finished(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, errors = process.communicate(timeout=200)
    return process.returncode, out, errors


def results_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "results.json").read_text())


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 100
    while not path.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)


def workers_of(launcher: int) -> list[int]:
    """The processes that it has started."""
    return [int(child) for child in Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()]


def worker_of(launcher: int, rank: int) -> int:
    """The process of that rank, by its environment."""
    children = workers_of(launcher)
    for child in children:
        if f"\0RANK={rank}\0".encode() in b"\0" + Path(f"/proc/{child}/environ").read_bytes():
            return child
    raise AssertionError(f"no process of rank {rank} among {children}")


def wait_for_end(process: int) -> None:
    """Of one that is no child."""
    deadline = time.monotonic() + 60
    while Path(f"/proc/{process}").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
