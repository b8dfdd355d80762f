"""A forked Python is, to what runs in it and to who started it, as a new one."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.processes.fork_server import Popen
from tests.processes.launching import python, torchrun, workers_of

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux's")
SELF = """
import json, os, signal, sys, threading, torch
handlers = [str(signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGPIPE, signal.SIGCHLD)]
streams = [(s.fileno(), s.encoding, s.errors, s.line_buffering) for s in (sys.stdin, sys.stdout, sys.stderr)]
print(json.dumps({
    "argv": sys.argv, "path": sys.path, "cwd": os.getcwd(), "environment": dict(os.environ), "name": __name__,
    "parent": os.getppid(), "session": os.getsid(0), "group": os.getpgid(0), "handlers": handlers, "streams": streams,
    "open": sorted(os.listdir("/proc/self/fd")), "threads": threading.active_count(), "ftfast": "ftfast" in sys.modules,
    "torch": (torch.get_num_threads(), torch.cuda.is_initialized()), "stdin": sys.stdin.read(),
}), flush=True)
"""


def told(start: type, *words: str, folder: Path) -> bytes:
    environment = {**os.environ, "OF_ITS_OWN": "caf\udce9", "PYTHONPATH": f"{Path(__file__).parents[2]}:/elsewhere"}
    process = start([sys.executable, *words, "a", "b c"], stdin=-1, stdout=-1, cwd=folder, env=environment)
    out, _ = process.communicate(b"what it reads")
    assert process.returncode == 0
    return out


@pytest.mark.process
@pytest.mark.parametrize("words", [("-c", SELF), ("-m", "told"), ("-u", "told.py"), ("sub/told.py",)])
def test_it_finds_what_a_new_one_finds(words: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    for name in ("told.py", "sub/told.py"):
        (tmp_path / name).write_text(SELF)
    assert told(Popen, *words, folder=tmp_path) == told(subprocess.Popen, *words, folder=tmp_path)


@pytest.mark.parametrize(
    ("code", "status"),
    [
        ("raise SystemExit(3)", 3),
        ("raise SystemExit('said')", 1),
        ("1 / 0", 1),
        ("raise KeyboardInterrupt", -signal.SIGINT),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", -signal.SIGKILL),
        ("import atexit, os; atexit.register(os._exit, 7)", 7),
        ("import sys, os; sys.stdout.reconfigure(write_through=False); os.close(1); sys.stdout.write('lost')", 120),
        ("import threading, time; threading.Thread(target=lambda: (time.sleep(0.1), print('late'))).start()", 0),
    ],
)
def test_it_ends_as_a_new_one_does(code: str, status: int) -> None:
    forked, new = python("-c", code), python("-c", code, start=subprocess.Popen)
    assert forked.returncode == new.returncode == status
    assert forked.stdout == new.stdout
    assert forked.stderr.splitlines()[-1:] == new.stderr.splitlines()[-1:]


def test_two_of_them_share_no_random_numbers() -> None:
    code = "import random, numpy, tempfile, torch\n"
    code += "print(random.random(), numpy.random.rand(), torch.initial_seed(), tempfile.mktemp())"
    ours, theirs = (python("-c", code).stdout.split() for _ in range(2))
    assert not set(ours) & set(theirs)


def test_a_folder_that_is_not_there_is_an_error_of_who_starts_it() -> None:
    with pytest.raises(OSError, match="not there"):
        python("-c", "pass", cwd="/not there")


@pytest.mark.process
def test_torchruns_workers_are_its_children_and_end_with_it(tmp_path: Path) -> None:
    (tmp_path / "worker.py").write_text(
        "import os, pathlib, time\n"
        "pathlib.Path(os.environ['RANK']).write_text(f'{os.getppid()} {os.getsid(0) == os.getpid()}')\n"
        "time.sleep(60)"
    )
    process = torchrun(2, str(tmp_path / "worker.py"), cwd=tmp_path)
    while not all((tmp_path / rank).exists() and (tmp_path / rank).read_text() for rank in "01"):
        assert process.poll() is None, process.communicate()
    assert [(tmp_path / rank).read_text() for rank in "01"] == [f"{process.pid} True"] * 2
    workers = workers_of(process.pid)
    assert sorted(workers) == [0, 1]
    process.terminate()
    process.communicate()
    assert not any(Path(f"/proc/{worker}").exists() for worker in workers.values())
