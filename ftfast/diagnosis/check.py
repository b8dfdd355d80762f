"""``ftfast check``: every kernel that can run here against the float64 reference."""

import argparse
import json
import os
import subprocess
import sys
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
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    names = [backend.name for backend in _kernel_backends()]
    parser.add_argument("--backend", choices=names, help="check this backend only")


def run(args: argparse.Namespace) -> int:
    found, shown = Findings(), _Shown(silent=args.json)
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
        print(*("", *found.skipped, f"{right} of {len(cases)} cases agree with the float64 reference."), sep="\n")
    return 0 if right == len(cases) else 1


class _Shown:
    """Prints outcomes one by one, as they are found, each table under its head; on a GPU each may be compiled first."""

    def __init__(self, *, silent: bool) -> None:
        self._silent = silent
        self._kind: type | None = None

    def __call__(self, outcomes: Iterable[Any]) -> list[Any]:
        kept = []
        for outcome in outcomes:
            kept.append(outcome)
            if self._silent:
                continue
            table = check_loss if isinstance(outcome, check_loss.Outcome) else check_head
            if type(outcome) is not self._kind:
                print(*([""] if self._kind else []), table.head(), sep="\n")
                self._kind = type(outcome)
            print(table.line(outcome), flush=True)
        return kept


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
