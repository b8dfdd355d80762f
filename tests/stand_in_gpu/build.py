"""Builds the libraries that stand in for CUDA's runtime and driver, once for each of their sources and runtimes."""

import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

SOURCE = Path(__file__).with_name("gpu.c")
RUNTIME, DRIVER = "libcudart.so.13", "libcuda.so.1"
# torch calls what is named here as it is imported: tests.stand_in_gpu.libraries.
ENTRY_POINT = "[torch.backends]\nstand_in_gpu = tests.stand_in_gpu.libraries:install\n"


class CannotBuildError(RuntimeError):
    """Why there is no stand-in on this machine, in a sentence."""


def _folders_of(package: str) -> list[Path]:
    found = importlib.util.find_spec(package)
    return [] if found is None else [Path(place) for place in found.submodule_search_locations or ()]


def _runtime() -> Path:
    """The runtime that torch was built for."""
    for folder in _folders_of("nvidia"):
        for found in folder.rglob(RUNTIME):
            return found
    raise CannotBuildError(f"the installed torch brings no {RUNTIME}.")


def _headers(runtime: Path) -> list[Path]:
    """torch's, and what they lack of them from Triton."""
    triton = [folder / "backends" / "nvidia" / "include" for folder in _folders_of("triton")]
    folders = [folder for folder in (runtime.parent.parent / "include", *triton) if (folder / "cuda.h").is_file()]
    if not folders:
        raise CannotBuildError("neither torch nor Triton brings the header cuda.h.")
    return folders


def _run(*command: str | Path) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines()
        raise CannotBuildError(f"{command[0]} ends with {done.returncode}: {said[0] if said else 'nothing said'}")
    return done.stdout


def _exported(binary: Path, *options: str) -> set[str]:
    lines = _run("nm", "--defined-only", *options, binary).splitlines()
    return {line.split()[-1].partition("@")[0] for line in lines if line.strip()}


def _make(folder: Path, compiler: str, runtime: Path, headers: list[Path]) -> None:
    def compiled(source: Path, *flags: str) -> Path:
        target = source.with_suffix(".o")
        _run(compiler, "-O2", "-fPIC", "-w", *flags, "-c", source, "-o", folder / target.name)
        return folder / target.name

    own = compiled(SOURCE, *(f"-I{header}" for header in headers))
    wanted = {name for name in _exported(runtime, "-D") if re.match(r"(__)?cuda", name)}
    wanted |= set(re.findall(r"\bcu[A-Z]\w+", (headers[0] / "cuda.h").read_text()))
    rest = folder / "rest.c"
    rest.write_text("".join(f"int {name}() {{ return 0; }}\n" for name in sorted(wanted - _exported(own))))
    names = folder / "names"
    names.write_text(f"{RUNTIME} {{ global: *; }};\n")
    link = (compiler, "-shared", f"-Wl,-soname,{RUNTIME}", f"-Wl,--version-script={names}")
    _run(*link, own, compiled(rest, "-fno-builtin"), "-ldl", "-lpthread", "-o", folder / RUNTIME)
    for name in (DRIVER, "libcuda.so"):
        (folder / name).symlink_to(RUNTIME)
    package = folder / "stand_in_gpu-0.dist-info"
    package.mkdir()
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: stand_in_gpu\nVersion: 0\n")
    (package / "entry_points.txt").write_text(ENTRY_POINT)


def libraries() -> Path:
    """The folder that holds them, under the system's folder for temporary files.

    Raises:
        CannotBuildError: there is no compiler, or no build of torch for CUDA 13.
    """
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None:
        raise CannotBuildError("there is no C compiler.")
    runtime = _runtime()
    sources = SOURCE.read_bytes() + Path(__file__).read_bytes() + str(runtime).encode()
    name = f"ftfast-stand-in-gpu-{os.getuid()}-{hashlib.sha256(sources).hexdigest()[:16]}"
    folder = Path(tempfile.gettempdir()) / name
    if not folder.is_dir():
        with tempfile.TemporaryDirectory(prefix=name) as aside:
            _make(Path(aside), compiler, runtime, _headers(runtime))
            try:
                Path(aside).rename(folder)
            except OSError:  # another process was faster
                if not folder.is_dir():
                    raise
            Path(aside).mkdir(exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise CannotBuildError(f"{folder} is of another user.")
    return folder
