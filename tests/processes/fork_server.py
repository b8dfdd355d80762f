"""Pythons that begin with torch imported: forked from a process that has imported it and has done nothing else.

:class:`Popen` takes what subprocess's takes. A command of this Python with ``-m``, ``-c`` or a file is forked, as a
child of who asks for it, with its own directory, environment, streams, arguments and ``sys.path``; any other is
spawned. The server has one thread and imports no module of ours: each child imports those itself, in its environment.
The workers of a forked torchrun are forked too. What differs from a new interpreter: the packages named here are
imported already, and ``/proc/PID/environ`` and the seed of hashes are the server's. Tests of importing spawn.
"""

import contextlib
import ctypes
import gc
import os
import pickle
import re
import runpy
import socket
import subprocess
import sys
import time
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

PACKAGES = (
    *("torch.distributed.launcher.api", "torch.utils.tensorboard", "torchvision", "safetensors.torch", "rich.progress"),
    *("matplotlib.backends.backend_agg", "matplotlib.backends.backend_svg", "matplotlib.figure"),
)
# What the interpreter and those packages read when they begin; a server serves one environment of these.
READ_ONCE = re.compile(r"PYTHON(?!PATH$)|(OMP|GOMP|KMP|MKL|OPENBLAS|LD|LC|TRITON|MPL)_|LANG|MALLOC_|CUDA_")
NAME, CHILD_SUBREAPER = 15, 36  # of prctl

# The words after the interpreter's, directory, environment, whether a session of its own, process group or -1.
Request = tuple[list[str], str, dict[str, str], bool, int]


def prctl(option: int, value: "int | bytes") -> None:
    if ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl")


def receive(connection: socket.socket, count: int) -> bytes:
    received = b""
    while len(received) < count:
        if not (more := connection.recv(count - len(received))):
            raise EOFError("the fork server is gone")
        received += more
    return received


def ask(server: socket.socket, request: Request, streams: list[int]) -> int:
    """The new process: a child of this one, though another has forked it."""
    message = pickle.dumps(request)
    # Whose parent ends becomes the child of the nearest ancestor that takes such children.
    prctl(CHILD_SUBREAPER, 1)
    try:
        socket.send_fds(server, [len(message).to_bytes(8, "big")], streams)
        server.sendall(message)
        process = int.from_bytes(receive(server, 8), "big")
    finally:
        prctl(CHILD_SUBREAPER, 0)
    if not process:
        raise ChildProcessError(f"{request[0]} could not begin in {request[1]}")
    return process


def serve(connection: socket.socket) -> list[str]:
    """Returns in each process that is asked for, the words of its command; the server ends with who asks."""
    while True:
        header, streams, *_ = socket.recv_fds(connection, 8, 3)
        if not header:
            os._exit(0)
        request: Request = pickle.loads(receive(connection, int.from_bytes(header, "big")))
        reading, writing = os.pipe()
        between = os.fork()
        if not between:
            between = os.getpid()
            if os.fork():
                os._exit(0)
            while os.getppid() == between:
                time.sleep(1e-4)
            os.close(connection.detach())
            os.close(reading)
            words = become(request, streams)
            os.write(writing, os.getpid().to_bytes(8, "big"))
            os.close(writing)
            return words
        os.waitpid(between, 0)
        os.close(writing)
        connection.sendall(os.read(reading, 8) or bytes(8))
        for handle in (reading, *streams):
            os.close(handle)


def become(request: Request, streams: list[int]) -> list[str]:
    """Puts in place what a new interpreter of that request has."""
    words, cwd, environment, new_session, group = request
    if new_session:
        os.setsid()
    if group != -1:
        os.setpgid(0, group)
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    ours = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    common = [path for path in sys.path[1:] if path not in ours]
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    unbuffered = words[0] == "-u" or bool(environment.get("PYTHONUNBUFFERED"))
    words = words[words[0] == "-u" :]
    theirs = [path for path in environment.get("PYTHONPATH", "").split(os.pathsep) if path]
    first = {"-m": os.getcwd(), "-c": ""}.get(words[0], os.path.dirname(os.path.realpath(words[0])))
    sys.path[:] = [first, *theirs, *common]
    for number, name in enumerate(("stdin", "stdout", "stderr")):  # those of the server know what its own can do
        old = getattr(sys, name)
        new = open(number, "w" if number else "r", -1, old.encoding, old.errors, closefd=False)  # noqa: SIM115
        line_buffering = not unbuffered and (number == 2 or os.isatty(number))
        new.reconfigure(line_buffering=line_buffering, write_through=unbuffered)
        setattr(sys, name, new)
        setattr(sys, f"__{name}__", new)
    if "RANK" in environment:  # by which tests find a process of torchrun
        prctl(NAME, f"rank{environment['RANK']}".encode())
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed()
    sys.modules["torch"].default_generator.seed()
    return words


def run(words: list[str]) -> None:
    """The interpreter does the rest, as it does after any program: what is raised here is its end."""
    if words[0] == "-m":
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    elif words[0] == "-c":
        sys.argv = ["-c", *words[2:]]
        main = sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(words[1], "<string>", "exec"), main.__dict__)
    else:
        sys.argv = words
        runpy.run_path(words[0], run_name="__main__")


def read_once(environment: Mapping[str, str]) -> tuple[tuple[str, str], ...]:
    return tuple(sorted(item for item in environment.items() if READ_ONCE.match(item[0])))


Spawned = subprocess.Popen  # in whose place a test may put what follows


class Popen(Spawned):
    servers: ClassVar[dict[Any, socket.socket]] = {}
    starts_servers: ClassVar[bool] = sys.platform == "linux"

    def _execute_child(self, args: Any, executable: Any, preexec: Any, close: Any, handles: Any, *rest: Any) -> None:
        """subprocess has no other place at which to make the process by other means."""
        cwd, environment, _, _, shell, *pipes = rest[:11]
        restored, *identity, new_session, group = rest[11:]
        environment = dict(os.environ if environment is None else environment)
        words = [] if isinstance(args, str) else [os.fspath(word) for word in args]
        plain = close and not (executable or preexec or handles or shell)
        plain = plain and (restored, *identity) == (True, None, None, None, -1)
        server = self._server(environment) if plain and is_forked(words) else None
        if server is None:
            super()._execute_child(args, executable, preexec, close, handles, *rest)  # type: ignore[misc]
            return
        streams = [number if pipe == -1 else pipe for number, pipe in enumerate((pipes[0], pipes[3], pipes[5]))]
        request = (words[1:], os.fspath(cwd or os.getcwd()), environment, bool(new_session), group)
        self.pid = ask(server, request, streams)
        self._child_created = True
        self._close_pipe_fds(*pipes)  # type: ignore[attr-defined]

    @classmethod
    def _server(cls, environment: dict[str, str]) -> "socket.socket | None":
        key = read_once(environment)
        if key not in cls.servers and cls.starts_servers:
            asking, answering = socket.socketpair()
            # numpy's OpenBLAS starts threads when it is loaded.
            Spawned(
                [sys.executable, __file__, str(answering.fileno())],
                env={**environment, "OPENBLAS_NUM_THREADS": "1"},
                pass_fds=[answering.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
            )
            answering.close()
            cls.servers[key] = asking
        return cls.servers.get(key)


def is_forked(words: list[str]) -> bool:
    rest = words[2:] if words[1:2] == ["-u"] else words[1:]
    return words[:1] == [sys.executable] and (rest[:1] in (["-m"], ["-c"]) or (bool(rest) and Path(rest[0]).is_file()))


if __name__ == "__main__":
    for name in PACKAGES:
        with contextlib.suppress(ImportError):  # what is not installed a child does not import either
            __import__(name)
    assert len(os.listdir("/proc/self/task")) == 1, "what has threads must not fork"
    gc.freeze()  # or each child, at its end, copies and searches all that was imported
    words = serve(socket.socket(fileno=int(sys.argv[1])))
    if words[:2] == ["-m", "torch.distributed.run"]:
        from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler

        asking, answering = socket.socketpair()
        if os.fork():
            answering.close()
            Popen.servers, Popen.starts_servers = {read_once(os.environ): asking}, False
            subprocess_handler.Popen = Popen  # type: ignore[misc]
        else:
            asking.close()
            words = serve(answering)
    run(words)
