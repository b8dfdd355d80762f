"""``python -m bench.on_gpu``: runs the steps one after the other, whatever becomes of each."""

import argparse
import importlib.util
import io
import json
import os
import shlex
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any, TextIO

from bench.on_gpu.steps import Step, steps

ARCHIVE_LIMIT = 15 * 2**20
LOG_TAIL = 60  # lines of a step's output
GRACE_SECONDS = 10
DONE, FAILED, TIMED_OUT, SKIPPED = "done", "failed", "timed out", "skipped"


@dataclass(frozen=True)
class Outcome:
    """What became of a step."""

    name: str
    status: str
    exit_status: int | None
    seconds: float
    reason: str
    command: str


class Stopped(Exception):
    """The runner was told to end."""


def run_command(
    command: list[str], output: Path, seconds: float, environment: dict[str, str]
) -> tuple[int | None, float]:
    """Run a command in a process group of its own.

    Returns:
        Its exit status, None where it ran past ``seconds`` and was ended with all that it started; and its duration.
    """
    begin = time.monotonic()
    with output.open("wb") as file:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            env={**os.environ, **environment},
            process_group=0,
        )
        status: int | None = None
        try:
            status = process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            pass
        finally:
            # Also what a step left running behind it.
            end_group(process)
    return status, time.monotonic() - begin


def end_group(process: "subprocess.Popen[bytes]") -> None:
    """End a process group, first by asking."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            break
        try:
            process.wait(timeout=GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            continue
    process.wait()


class Runner:
    """Runs steps and keeps the log, the list of outcomes and the archive up to date.

    Args:
        out: the folder for log and archive.
        results: the folder for what the steps write.
        minutes: the limit of each step.
        environment: of every step.
        small: run the smallest forms.
    """

    def __init__(
        self, out: Path, results: Path, minutes: float, environment: dict[str, str], *, small: bool = False
    ) -> None:
        self._out, self._results = out, results
        self._seconds = 60 * minutes
        self._environment = environment
        self._small = small
        self.outcomes: list[Outcome] = []
        self._log: TextIO = (out / "log.txt").open("w")

    def say(self, text: str) -> None:
        """Into the log, and on standard output."""
        print(text, flush=True)
        print(text, file=self._log, flush=True)

    def run(self, step: Step, has_gpu: bool) -> Outcome:
        """Run a step, or say why not."""
        command = step.small if self._small else step.command
        reason = self._why_not(step, command, has_gpu)
        if reason or command is None:
            return self._ended(Outcome(step.name, SKIPPED, None, 0.0, reason, shlex.join(step.command)), None)
        self.say(f"== {step.name}: {shlex.join(command)}")
        output = self._results / f"{step.name}.txt"
        environment = {**self._environment, **step.environment, **(step.small_environment if self._small else {})}
        try:
            status, seconds = run_command(command, output, self._seconds, environment)
        except OSError as error:
            return self._ended(Outcome(step.name, FAILED, None, 0.0, str(error), shlex.join(command)), None)
        word = TIMED_OUT if status is None else FAILED if status else DONE
        return self._ended(Outcome(step.name, word, status, round(seconds, 1), "", shlex.join(command)), output)

    def _why_not(self, step: Step, command: list[str] | None, has_gpu: bool) -> str:
        if not has_gpu and (command is None or not self._small):
            return "it needs a GPU, and torch finds none"
        needed = step.needs + (step.small_needs if self._small else ())
        missing = [name for name in needed if importlib.util.find_spec(name) is None]
        if missing:
            return f"it needs the package {' and '.join(missing)}, which is not installed"
        if step.probe:
            probe = self._results / f"{step.name}.txt"
            try:
                status, _ = run_command(step.probe, probe, self._seconds, self._environment)
            except OSError as error:
                return str(error)
            if status != 0:
                return f"{shlex.join(step.probe)} ends with {status}"
        return ""

    def _ended(self, outcome: Outcome, output: Path | None) -> Outcome:
        if output is not None:
            tail = output.read_text(errors="replace").splitlines()[-LOG_TAIL:]
            self.say("\n".join(tail))
        exit_status = "" if outcome.exit_status is None else f", exit status {outcome.exit_status}"
        reason = f": {outcome.reason}" if outcome.reason else ""
        self.say(f"-- {outcome.name}: {outcome.status}{exit_status}, {outcome.seconds:.0f} s{reason}")
        self.outcomes.append(outcome)
        self.keep()
        return outcome

    def keep(self) -> None:
        """Write the outcomes and the archive."""
        text = json.dumps([asdict(outcome) for outcome in self.outcomes], indent=1)
        (self._results / "steps.json").write_text(text + "\n")
        (self._results / "log.txt").write_text((self._out / "log.txt").read_text())
        write_archive(self._results, self._out / "results.tar.gz", ARCHIVE_LIMIT)


def write_archive(folder: Path, archive: Path, limit: int) -> list[Path]:
    """Pack the files of a folder, without the largest where they come to more than ``limit`` bytes.

    Returns:
        What was left out; the archive names it in ``left_out.txt``.
    """
    files = sorted((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    left_out: list[Path] = []
    while True:
        packed = io.BytesIO()
        with tarfile.open(fileobj=packed, mode="w:gz") as tar:
            for path in files:
                tar.add(path, arcname=str(path.relative_to(folder)))
            if left_out:
                names = "".join(f"{path.relative_to(folder)} {path.stat().st_size}\n" for path in left_out).encode()
                header = tarfile.TarInfo("left_out.txt")
                header.size = len(names)
                tar.addfile(header, io.BytesIO(names))
        if packed.tell() <= limit or not files:
            break
        left_out.append(files.pop())
    aside = archive.with_name(archive.name + ".new")
    aside.write_bytes(packed.getvalue())
    aside.replace(archive)
    return left_out


def describe(runner: Runner, results: Path, environment: dict[str, str]) -> bool:
    """Record the machine; whether torch finds a GPU there."""
    path = results / "machine.json"
    command = [sys.executable, "-m", "bench.on_gpu.describe", "--out", str(path)]
    status, _ = run_command(command, results / "machine.txt", 120, environment)
    try:
        found: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError):
        runner.say(f"the machine cannot be described (exit status {status}):")
        runner.say((results / "machine.txt").read_text(errors="replace"))
        return False
    runner.say(json.dumps(found, indent=1))
    return bool(found["gpu"])


def build_parser() -> argparse.ArgumentParser:
    """The parser of bench/on_gpu.sh."""
    parser = argparse.ArgumentParser(
        prog="bench/on_gpu.sh", description="Build, test and measure ftfast on a machine with a GPU, without a network."
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder for results.tar.gz and log.txt")
    parser.add_argument("--revision", metavar="REV", help="of the checkout, where git cannot say")
    parser.add_argument("--minutes", type=float, default=8.0, help="limit of each step, default: 8")
    parser.add_argument("--steps", metavar="LIST", help="only these, with commas")
    parser.add_argument("--list", action="store_true", help="name the steps, and stop")
    parser.add_argument("--dry-run", action="store_true", help="every step in its smallest form, on the CPU")
    return parser


def chosen_steps(results: Path, names: str | None, refuse: Callable[[str], Any]) -> list[Step]:
    """The steps that were asked for, in their order."""
    known = {step.name: step for step in steps(results)}
    if names is None:
        return list(known.values())
    wanted = [name.strip() for name in names.split(",")]
    for name in wanted:
        if name not in known:
            refuse(f"--steps has {name!r}; take of {', '.join(known)}.")
    return [step for name, step in known.items() if name in wanted]


def stop(number: int, frame: FrameType | None) -> None:
    """The handler of signals that ask for an end."""
    raise Stopped


def main(arguments: list[str]) -> int:
    """Returns 0, 1 where a step failed or timed out, 143 where it was told to end; exits with 2 for bad input."""
    parser = build_parser()
    options = parser.parse_args(arguments)
    if options.list:
        print("\n".join(step.name for step in steps(Path())))
        return 0
    if options.out is None or not options.revision:
        parser.error("--out and --revision are needed: where the results go, and what they are of.")
    if not options.minutes > 0:
        parser.error(f"--minutes is {options.minutes}; it takes a number above 0.")
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--out is {options.out}, which cannot be a folder: {error.strerror}.")
    signal.signal(signal.SIGTERM, stop)
    with tempfile.TemporaryDirectory(prefix="ftfast-on-gpu-") as folder:
        results = Path(folder)
        chosen = chosen_steps(results, options.steps, parser.error)
        environment = {"FTFAST_BENCH_REVISION": options.revision, "FTFAST_CACHE": str(results / "cache")}
        runner = Runner(options.out, results, options.minutes, environment, small=options.dry_run)
        runner.say(f"revision {options.revision}, {time.strftime('%Y-%m-%d %H:%M:%S %Z')}")
        try:
            has_gpu = describe(runner, results, environment)
            for step in chosen:
                runner.run(step, has_gpu and not options.dry_run)
        except (Stopped, KeyboardInterrupt):
            runner.say("told to end; what follows was not run")
            runner.keep()
            return 143
        wrong = [outcome.name for outcome in runner.outcomes if outcome.status in (FAILED, TIMED_OUT)]
        runner.say(f"not done: {', '.join(wrong)}" if wrong else "all steps done or skipped")
        runner.keep()
        return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
