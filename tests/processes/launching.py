"""Starting Pythons, and runs as torchrun does, and finding their processes; forked unless a test says otherwise."""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.processes.fork_server import Popen

ROOT = Path(__file__).parents[2]


def python(*words: str, start: type[Any] = Popen, **options: Any) -> subprocess.CompletedProcess[str]:
    """Runs this Python to its end, with what it prints; ``start=subprocess.Popen`` for a new interpreter."""
    command = [sys.executable, *words]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": ROOT, **options}
    with start(command, **options) as process:
        try:
            out, errors = process.communicate(timeout=250)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
    return subprocess.CompletedProcess(command, process.returncode, out, errors)


def torchrun(
    processes: int,
    *command: str,
    restarts: int = 0,
    options: Sequence[str] = ("--standalone",),
    start: type[Any] = Popen,
    cwd: Path = ROOT,
) -> subprocess.Popen[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", *options, "--max-restarts", str(restarts)]
    return start(
        [*launcher, "--nproc-per-node", str(processes), *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        cwd=cwd,
    )


def finished(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, errors = process.communicate(timeout=200)
    return process.returncode, out, errors


def results_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "results.json").read_text())


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 200
    while not path.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)


def workers_of(launcher: int) -> dict[int, int]:
    """The processes that it has started, by their ranks."""
    children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    return {rank: int(child) for child in children if (rank := _rank_of(Path("/proc") / child)) is not None}


def _rank_of(process: Path) -> "int | None":
    """By its environment, or by its name if it was forked."""
    found = re.search(rb"(?:\A|\0)RANK=(\d+)\0", (process / "environ").read_bytes())
    found = found or re.match(rb"rank(\d+)", (process / "comm").read_bytes())
    return int(found[1]) if found else None


def wait_for_end(process: int) -> None:
    """Of one that is no child."""
    deadline = time.monotonic() + 200
    while Path(f"/proc/{process}").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
