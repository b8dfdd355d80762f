"""``python -m bench.on_gpu --out DIR --revision REV``: one visit to a GPU, without a network, in under ten minutes.

The parts come in order of value, each with a limit of its own, and every finding is a line of ``DIR/visit.jsonl`` as
soon as it is there. ``python -m bench record DIR/visit.jsonl --out RECORD`` makes a record of them. A process does one
part after the other; where a part runs over its limit the process is ended, and another does what is left.
"""

import argparse
import importlib.util
import json
import os
import queue
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any

SECONDS = 570.0
PYTHON = sys.executable
REHEARSAL = "a rehearsal without a GPU, of which nothing is measured"
TAIL = 40  # lines of a command's output
FAILURE = re.compile(r"\b(FAILED|ERROR)\b|\berror:")
PEERS = ("--peers", "eager,compile,torchdistill-formula")
# What takes a second where nothing is computed, and nothing is compiled.
SMALL = ("--quick", "--peers", "eager", "--shapes", "2x4x2x2", "--heads", "2x4:4x2x2", "--layouts", "nchw")
Say = Callable[..., None]


@dataclass(frozen=True)
class Part:
    """A command, or words for ``python -m bench``.

    Attributes:
        seconds: its limit.
        small: in place of ``words`` in a rehearsal.
    """

    name: str
    seconds: float
    words: tuple[str, ...]
    small: tuple[str, ...]
    is_bench: bool = True


def parts() -> list[Part]:
    """In order of value."""
    tests = (PYTHON, "-m", "pytest", "-v", "-p", "no:cacheprovider", "--tb=short", "-m", "cuda")
    beside = ("-n", "12") if importlib.util.find_spec("xdist") else ()  # most of their time is compiling
    build = (PYTHON, "setup.py", "build_ext", "--inplace")
    heads = ("ft_head", "--heads", "cifar-r56-r20,imagenet-r34-r18", "--dtype", "bfloat16", *PEERS)
    loss = ("ft_loss", "--layouts", "channels_last", *PEERS, "--dtype")
    return [
        Part("build", 150, build, (PYTHON, "setup.py", "--version"), is_bench=False),
        Part("tests", 100, (*tests, *beside, "tests"), (*tests, "--collect-only", "tests/gpu/test_repeats.py"), False),
        Part("host", 40, ("host_time",), ("host_time", *SMALL)),
        Part("loss", 80, (*loss, "bfloat16"), ("ft_loss", *SMALL)),
        Part("head", 80, heads, ("ft_head", *SMALL)),
        Part("CIFAR", 120, ("distill_step", "--pairs", "cifar", *PEERS), ("distill_step", *SMALL)),
        Part("ImageNet", 120, ("distill_step", "--pairs", "imagenet", *PEERS), ()),
        Part("store", 100, ("store", *PEERS), ("store", *SMALL)),
        Part("photographs", 100, ("loaders", "--loaders", "gpu,folder"), ()),
        Part("loss in float32", 80, (*loss, "float32"), ()),
    ]


def run_command(words: tuple[str, ...], say: Say) -> None:
    """Says a line that tells of a failure at once, then how it ended and the end of what it wrote."""
    last: deque[str] = deque(maxlen=TAIL)
    with subprocess.Popen(
        words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            last.append(line.rstrip())
            if FAILURE.search(line):
                say(failure=line.rstrip())
    say(exit_status=process.returncode, output=list(last))


def run_bench(words: tuple[str, ...], say: Say, rehearsed: bool) -> None:
    """Says the machine, every row as it is known, and how the GPU fared."""
    from bench.arguments import build_parser, settings_from
    from bench.harness import power, running
    from bench.harness.clocks import own_stream
    from bench.harness.registry import discover
    from ftfast.distillation.monitor import gpu_meter

    benches = discover()
    parser = build_parser(benches)
    options = parser.parse_args(list(words))
    settings = settings_from(options, parser)
    plan = replace(
        settings.plan,
        blocks=1,
        block_seconds=0.0 if rehearsed else 0.1,
        energy_seconds=0.0,
        known=lambda row: say(row=asdict(row)),
        rehearsed=rehearsed,
    )
    running.prepare(None)
    begun = running.begun(settings.device, plan, words, [REHEARSAL] if rehearsed else [])
    (name,) = options.what
    say(record={**asdict(begun), "formulas": {name: benches[name].formula}})
    with power.Watch(gpu_meter.gpu_of(settings.device)) as watch, own_stream(settings.device):
        benches[name].run(replace(settings, plan=plan), lambda what: None)
    say(gpu=watch.summary())


def work(names: list[str], small: bool) -> None:
    """Do these parts, each finding a line on standard output."""
    for part in parts():
        if part.name not in names:
            continue

        def say(name: str = part.name, **found: Any) -> None:
            print(json.dumps({"part": name, **found}), flush=True)

        say(begins=True)
        words = part.small if small else part.words
        begin = time.monotonic()
        try:
            if part.is_bench:
                run_bench(words, say, small)
            else:
                run_command(words, say)
        except (Exception, SystemExit) as error:  # the other parts are still to come
            say(error=f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}")
        say(ends=True, seconds=round(time.monotonic() - begin, 1))


class Visit:
    """The parts one after the other, whatever becomes of each.

    Args:
        out: the folder for ``visit.jsonl`` and ``log.txt``.
        seconds: after which nothing goes on.
        command: does the parts whose names, with commas, are put behind it, and writes lines as :func:`work` does.
        limits: seconds of each part by name, in their order.
    """

    def __init__(self, out: Path, seconds: float, command: list[str], limits: dict[str, float]) -> None:
        self._file = (out / "visit.jsonl").open("w")
        self._log = (out / "log.txt").open("w")
        self._begin = time.monotonic()
        self._seconds, self._command, self._limits = seconds, command, limits
        self.wrong: list[str] = []

    def run(self) -> None:
        """All of them; :attr:`wrong` names those that failed, or did not come to their end."""
        waiting = list(self._limits)
        while waiting:
            if self._left() <= 0:
                for name in waiting:
                    self._say(part=name, left_out="out of time")
                self.wrong += waiting
                return
            waiting = self._run_some(waiting)

    def _left(self) -> float:
        return self._begin + self._seconds - time.monotonic()

    def _say(self, **found: Any) -> None:
        line = json.dumps({"at": round(time.monotonic() - self._begin, 1), **found})
        print(line[:200], flush=True)
        print(line, file=self._file, flush=True)

    def _run_some(self, waiting: list[str]) -> list[str]:
        """One process until it ends or a part's limit does; returns what is left to do."""
        words = [*self._command, ",".join(waiting)]
        process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=self._log, text=True, process_group=0)
        lines: queue.Queue[str | None] = queue.Queue()
        reader = threading.Thread(target=_read, args=(process, lines), daemon=True)
        reader.start()
        current, deadline = waiting[0], time.monotonic() + min(self._limits[waiting[0]], self._left())
        reason = "its process ended"
        try:
            while current:
                try:
                    line = lines.get(timeout=max(0.0, deadline - time.monotonic()))
                except queue.Empty:
                    reason = "its time was over"
                    break
                if line is None:
                    break
                found = json.loads(line)
                self._say(**found)
                if found.get("error") or found.get("exit_status"):
                    self.wrong.append(current)
                if found.get("ends"):
                    waiting = waiting[1:]
                    current = waiting[0] if waiting else ""
                    deadline = time.monotonic() + min(self._limits.get(current, 0.0), self._left())
        finally:
            _end(process)
        if current:
            self._say(part=current, stopped=reason)
            self.wrong.append(current)
            waiting = waiting[1:]
        return waiting


def _read(process: "subprocess.Popen[str]", lines: "queue.Queue[str | None]") -> None:
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("{"):  # some library may print too
            lines.put(line)
    lines.put(None)


def _end(process: "subprocess.Popen[str]") -> None:
    """End a process and all that it started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def stop(number: int, frame: FrameType | None) -> None:
    """The handler of a signal that asks for an end."""
    sys.exit(128 + number)


def main(arguments: list[str]) -> int:
    """Returns 0, or 1 where a part failed or did not come to its end; exits with 2 for bad input."""
    known = {part.name: part for part in parts()}
    parser = argparse.ArgumentParser(prog="python -m bench.on_gpu", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder for visit.jsonl and log.txt")
    parser.add_argument("--revision", metavar="REV", help="of the checkout, where git cannot say")
    parser.add_argument("--seconds", type=float, default=SECONDS, help=f"for all parts, default: {SECONDS:g}")
    parser.add_argument("--parts", metavar="LIST", help=f"only these, with commas: {','.join(known)}")
    parser.add_argument("--small", action="store_true", help="a rehearsal: what every part does at its least")
    parser.add_argument("--work", metavar="LIST", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.work:
        work(options.work.split(","), options.small)
        return 0
    if options.out is None or not options.revision:
        parser.error("--out and --revision are needed: where the findings go, and what they are of.")
    chosen = options.parts.split(",") if options.parts else list(known)
    for name in chosen:
        if name not in known:
            parser.error(f"--parts has {name!r}; take of {', '.join(known)}.")
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--out is {options.out}, which cannot be a folder: {error.strerror}.")
    limits = {
        name: part.seconds for name, part in known.items() if name in chosen and (part.small or not options.small)
    }
    signal.signal(signal.SIGTERM, stop)
    with tempfile.TemporaryDirectory(prefix="ftfast-on-gpu-") as cache:
        os.environ |= {
            "FTFAST_BENCH_REVISION": options.revision,
            "FTFAST_CACHE": cache,
            # While torch.compile works nothing is measured.
            "TORCHINDUCTOR_COMPILE_THREADS": "8",
        }
        command = [PYTHON, "-m", "bench.on_gpu", *(["--small"] if options.small else []), "--work"]
        visit = Visit(options.out, options.seconds, command, limits)
        visit.run()
    print(f"not done: {', '.join(dict.fromkeys(visit.wrong))}" if visit.wrong else "all parts done", flush=True)
    return 1 if visit.wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
