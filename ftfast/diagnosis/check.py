"""``ftfast check``: every kernel that can run here against the float64 reference."""

import argparse
import json
import os
import shutil
import subprocess
import sys
import textwrap
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from ftfast.backends import KernelBackend
from ftfast.diagnosis import check_head, check_loss
from ftfast.dispatch import BACKENDS, supports


@dataclass
class Findings:
    """What was checked, and what could not be."""

    losses: list[check_loss.Outcome] = field(default_factory=list)
    heads: list[check_head.HeadOutcome] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rows", action="store_true", help="print every case, not only those that are wrong")
    parser.add_argument("--json", action="store_true", help="print JSON, with every case")
    names = [backend.name for backend in _kernel_backends()]
    parser.add_argument("--backend", choices=names, help="check this backend only")


def run(args: argparse.Namespace) -> int:
    found, shown = Findings(), _Shown(silent=args.json, rows=args.rows)
    for backend, device in _backends(args.backend):
        support = supports(backend.name, device, torch.float32, torch.float32)
        if support.ok:
            found.losses += shown(check_loss.check_backend(backend, device))
            found.heads += shown(check_head.check_heads(backend, device))
        elif environment := backend.environment_to_run(device):
            elsewhere = _check_elsewhere(backend.name, environment)
            found.losses += shown(elsewhere.losses)
            found.heads += shown(elsewhere.heads)
            found.skipped += elsewhere.skipped
        else:
            where = "here" if device.type == "cpu" else "on the GPU"
            found.skipped.append(f"{backend.name} cannot run {where}: {support.reason}.")
    if args.backend and not found.losses:
        print(f"ftfast check: error: {found.skipped[0]}", file=sys.stderr)
        return 2
    cases: list[check_loss.Outcome | check_head.HeadOutcome] = [*found.losses, *found.heads]
    right = sum(case.ok for case in cases)
    if args.json:
        print(json.dumps(asdict(found), indent=1))
    else:
        shown.end()
        width = shutil.get_terminal_size().columns if sys.stdout.isatty() else sys.maxsize
        print(*(textwrap.fill(line, width) for line in (*found.skipped, _summary(cases))), sep="\n")
    return 0 if right == len(cases) else 1


def _summary(cases: list[check_loss.Outcome | check_head.HeadOutcome]) -> str:
    agreeing = f"{sum(case.ok for case in cases)} of {len(cases)} cases agree with the float64 reference"
    if not cases:
        return f"{agreeing}."
    where = Counter((case.backend, case.device) for case in cases)
    counts = ", ".join(f"{backend} on {device} {count}" for (backend, device), count in where.items())
    largest = max(case.share for case in cases)
    return f"{agreeing} ({counts}); the largest error is {largest:.2f} of what its dtype allows."


class _Shown:
    """Prints outcomes one by one, as they are found, each table under its head; on a GPU each may be compiled first.

    Without ``rows`` only those that are wrong; a terminal is told how many there have been, until the end.
    """

    def __init__(self, *, silent: bool, rows: bool) -> None:
        self._silent, self._rows = silent, rows
        self._kind: type | None = None
        self._counts = sys.stderr.isatty() and not silent and not rows
        self._count = 0

    def __call__(self, outcomes: Iterable[Any]) -> list[Any]:
        kept = []
        for outcome in outcomes:
            kept.append(outcome)
            self._count += 1
            if self._counts:
                print(f"\r{self._count} cases checked", end="", file=sys.stderr, flush=True)
            if self._silent or (outcome.ok and not self._rows):
                continue
            self._clear()
            table = check_loss if isinstance(outcome, check_loss.Outcome) else check_head
            if type(outcome) is not self._kind:
                print(*([""] if self._kind else []), table.head(), sep="\n")
                self._kind = type(outcome)
            print(table.line(outcome), flush=True)
        return kept

    def end(self) -> None:
        """What follows is set apart from the rows."""
        self._clear()
        if self._kind is not None:
            print()

    def _clear(self) -> None:
        if self._counts:
            print("\r" + " " * 30 + "\r", end="", file=sys.stderr, flush=True)


def _kernel_backends() -> list[KernelBackend]:
    return [backend for backend in BACKENDS.values() if isinstance(backend, KernelBackend)]


def _backends(asked: str | None) -> list[tuple[KernelBackend, torch.device]]:
    """Each backend on every device here that its kernels are for; where there is none, on the CPU all the same."""
    here = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    return [
        (backend, torch.device(kind))
        for backend in _kernel_backends()
        if asked in (None, backend.name)
        for kind in [kind for kind in here if kind in backend.device_types] or ["cpu"]
    ]


def _check_elsewhere(backend: str, environment: dict[str, str]) -> Findings:
    """The findings of a process of its own, for a backend that cannot run in this one.

    Triton's interpreter needs numpy too, which neither Triton nor torch brings, and some versions do not go together.
    """
    command = [sys.executable, "-m", "ftfast", "check", "--backend", backend, "--json"]
    done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True)
    if done.returncode not in (0, 1) or not done.stdout:
        said = (done.stderr.strip().splitlines() or [f"its process ended with status {done.returncode}"])[-1]
        reason = said.rpartition(": error: ")[2].rstrip(".")[:300]
        return Findings(skipped=[f"interpreter: not checked, because Triton's interpreter fails here: {reason}."])
    found = json.loads(done.stdout)
    return Findings(
        losses=[check_loss.Outcome(**outcome) for outcome in found["losses"]],
        heads=[check_head.HeadOutcome(**outcome) for outcome in found["heads"]],
    )
