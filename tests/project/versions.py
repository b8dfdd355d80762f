"""``make test-versions``: the core of the tests with the oldest torch that is taken, and with every Python there is.

Each pair of Python and torch gets an environment of its own, ``.venv-py312-torch211``, which stays for the next time.
PYTHONS="3.12 3.13" and TORCHES="2.11 newest" name others, of which every pair is tried; FTFAST_CUDA=0 builds no CUDA
kernels.
"""

import os
import re
import shutil
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
NEWEST = "newest"
PYTHONS = ("3.11", "3.12", "3.13", "3.14")
GIBIBYTES = 9  # torch with CUDA's libraries, and pip's copies of them on the way
# What touches torch: the loss, the heads and their kernels, modules, compilation, checkpoints and a short training.
CORE = (
    "tests/losses/test_ft_loss.py",
    "tests/losses/test_reference.py",
    "tests/head/test_modules.py",
    "tests/head/test_ft_head.py",
    "tests/losses/test_attention.py",
    "tests/convolutions/test_batch_norm.py",
    "tests/features/test_taps.py",
    "tests/features/test_features.py",
    "tests/backends/test_compile.py",
    "tests/features/test_frozen.py",
    "tests/training/test_checkpoints.py",
    "tests/conversions/test_conversion.py",
    "tests/training/test_distill_data.py",
    "tests/training/test_student_step.py",
    "tests/features/test_public_api.py",
    "tests/backends/test_dispatch.py",
    "tests/training/test_stratified.py",
)
INTERPRETED = (
    "tests/losses/test_ft_loss.py",
    "tests/losses/test_ft_loss_triton.py",
    "tests/losses/test_attention_triton.py",
)


class Pair(NamedTuple):
    """A Python, ``"3.12"``, and a torch, ``"2.11"`` or ``"newest"``."""

    python: str
    torch: str

    @property
    def folder(self) -> Path:
        torch = self.torch if self.torch == NEWEST else f"torch{self.torch.replace('.', '')}"
        return ROOT / f".venv-py{self.python.replace('.', '')}-{torch}"

    @property
    def requirements(self) -> list[str]:
        """What pip is asked for beside ftfast; the interpreter of the oldest torch's Triton fails with numpy 2.4."""
        return ["torch"] if self.torch == NEWEST else [f"torch=={self.torch}.*", "numpy<2.4"]


class Row(NamedTuple):
    """One line of the table."""

    pair: Pair
    outcome: str
    versions: str = ""
    seconds: float = 0.0


def oldest_torch() -> str:
    """The floor of pyproject.toml's dependencies."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (floor,) = re.findall(r"torch>=([\d.]+)", " ".join(project["dependencies"]))
    return floor


def find_python(version: str) -> str | None:
    """An interpreter of that version that can make environments: of those on PATH, then pyenv's."""
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path("~/.pyenv").expanduser())
    candidates = [
        shutil.which(f"python{version}"),
        *sorted(pyenv.glob(f"versions/{version}.*/bin/python"), reverse=True),
    ]
    for candidate in filter(None, candidates):
        code = f"import ensurepip, venv, sys; sys.exit('%d.%d' % sys.version_info[:2] != {version!r})"
        if not subprocess.run([candidate, "-c", code], capture_output=True).returncode:
            return str(candidate)
    return None


def choose_pairs(pythons: list[str], torches: list[str]) -> list[Pair]:
    """Every pair of what was named; unnamed, the oldest torch on the oldest Python and the newest on each."""
    if pythons or torches:
        return [Pair(python, torch) for python in pythons or PYTHONS for torch in torches or [oldest_torch(), NEWEST]]
    return [Pair(PYTHONS[0], oldest_torch()), *(Pair(python, NEWEST) for python in PYTHONS)]


def why_not(pair: Pair) -> str:
    """Why a pair cannot be tried here; empty where it can."""
    if find_python(pair.python) is None:
        return f"no Python {pair.python} with its venv module was found"
    free = shutil.disk_usage(ROOT).free / 2**30
    if free < GIBIBYTES and not (pair.folder / "ready").exists():
        return f"{free:.0f} GiB of disk are free, and it takes {GIBIBYTES}"
    return ""


def run(command: list[str], **environment: str) -> tuple[int, str]:
    """The exit status and what was said."""
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "TRITON_INTERPRET")}
    done = subprocess.run(
        command, cwd=ROOT, env={**kept, **environment}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    return done.returncode, done.stdout


def last_line(said: str) -> str:
    return (said.strip().splitlines() or ["nothing was said"])[-1]


def set_up(pair: Pair) -> str:
    """Makes the environment; what went wrong, or nothing."""
    python = str(pair.folder / "bin" / "python")
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    commands = [[*pip, "--upgrade", "--editable", ".[distill,test]", *pair.requirements]]
    if not Path(python).exists():
        commands.insert(0, [str(find_python(pair.python)), "-m", "venv", str(pair.folder)])
    for command in commands:
        status, said = run(command)
        if status:
            (pair.folder / "set-up.log").write_text(said)
            errors = [line for line in said.splitlines() if "ERROR" in line]
            return f"not set up: {(errors or [last_line(said)])[0]}"
    (pair.folder / "ready").touch()
    return ""


def test(pair: Pair) -> Iterator[Row]:
    """The table's rows of one pair: kernels compiled for this processor, and Triton's in its interpreter."""
    if (reason := why_not(pair)) or (reason := set_up(pair)):
        yield Row(pair, reason if reason.startswith("not set up") else f"skipped: {reason}")
        return
    python = str(pair.folder / "bin" / "python")
    code = (
        "import importlib.metadata as m\n"
        "print(', '.join(f'{n} {m.version(n)}' for n in ('torch', 'triton', 'numpy') if any(m.distributions(name=n))))"
    )
    versions = last_line(run([python, "-c", code])[1])
    for name, files, environment in (
        ("native", CORE, {"FTFAST_REQUIRE_NATIVE": "1"}),
        ("interpreter", INTERPRETED, {"TRITON_INTERPRET": "1"}),
    ):
        begun = time.monotonic()
        pytest = ["-m", "pytest", "-q", "-n", "2", "--dist", "worksteal", "-p", "no:cacheprovider", "-m", "not slow"]
        status, said = run([python, *pytest, *files], **environment)
        (pair.folder / f"{name}.log").write_text(said)
        log = f"; see {(pair.folder / name).relative_to(ROOT)}.log" if status else ""
        yield Row(pair, f"{name}: {last_line(said).strip('= ')}{log}", versions, time.monotonic() - begun)


def main() -> int:
    """Prints the table row by row; 1 where a pair failed, 0 where all that could be tried passed."""
    failed = False
    print(f"core: {' '.join(CORE)}\nin Triton's interpreter: {' '.join(INTERPRETED)}\n")
    print(f"{'Python':<8}{'torch':<8}{'installed':<44}{'seconds':>8}  outcome", flush=True)
    for pair in choose_pairs(os.environ.get("PYTHONS", "").split(), os.environ.get("TORCHES", "").split()):
        for row in test(pair):
            seconds = f"{row.seconds:.0f}" if row.seconds else ""
            print(f"{pair.python:<8}{pair.torch:<8}{row.versions:<44}{seconds:>8}  {row.outcome}", flush=True)
            failed |= not row.outcome.startswith("skipped") and ("not set up" in row.outcome or "see " in row.outcome)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
