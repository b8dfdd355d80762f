"""Builds ftfast._C from csrc/ with ninja: no torch headers, so one build serves every torch version.

Without a compiler or Python.h the package installs without the extension, and ``ftfast info`` gives the reason kept
in ``ftfast/_build_report.json``; with them, a compile error fails the install.
"""

import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent
CPP_FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math", "-Wall"]
# FP contraction is spelled out in the kernels, so that every instruction set rounds where it is told to.
CPP_FLAGS += ["-ffp-contract=off"]
NVCC_FLAGS = ["-std=c++17", "-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden", "--threads", "2"]
NVCC_TARGETS = ["80", "90", "100"]

# Every file of csrc/cpu is compiled once for each of these; csrc/instruction_set.cpp picks one at run time.
X86_INSTRUCTION_SETS = {
    "baseline": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c", "-mprefer-vector-width=512"],
}

# Every file of csrc/cpu_bf16 is compiled for these alone, where the compiler knows them.
AVX512_BF16 = [*X86_INSTRUCTION_SETS["avx512"], "-mavx512bf16"]


def find_compiler() -> list[str]:
    """The C++ compiler's command: the words of CXX, else the first of the usual names; empty where there is none."""
    words = shlex.split(os.environ.get("CXX", ""))
    for command in [words] if words else [["c++"], ["g++"], ["clang++"]]:
        if found := shutil.which(command[0]):
            return [found, *command[1:]]
    return []


def find_nvcc() -> str | None:
    """nvcc's path, unless FTFAST_CUDA=0."""
    if os.environ.get("FTFAST_CUDA") == "0":
        return None
    home = os.environ.get("CUDA_HOME")
    return shutil.which("nvcc", path=str(Path(home) / "bin")) if home else shutil.which("nvcc")


def missing_tool() -> str | None:
    """Why the extension cannot be built here, in a sentence for users; None where it can."""
    if os.environ.get("CXX") and not find_compiler():
        return (
            f"CXX was {os.environ['CXX']!r} when ftfast was installed, which is no command, so it has no native kernels"
        )
    if not find_compiler():
        return "no C++ compiler was found when ftfast was installed (apt-get install g++), so it has no native kernels"
    if not (Path(sysconfig.get_paths()["include"]) / "Python.h").is_file():
        return (
            "Python.h was missing when ftfast was installed (apt-get install python3-dev), so it has no native kernels"
        )
    return None


def builds(compiler: list[str], flags: list[str], program: str) -> bool:
    """Whether the compiler makes a program of this source with these flags."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "probe.cpp"
        source.write_text(program)
        command = [*compiler, *flags, str(source), "-o", str(source.with_suffix(""))]
        return subprocess.run(command, capture_output=True).returncode == 0


def openmp_flags(compiler: list[str]) -> list[str]:
    """``-fopenmp`` where the compiler links it; without it the kernels run on one thread."""
    program = "#include <omp.h>\nint main() { return omp_get_max_threads() < 1; }\n"
    return ["-fopenmp"] if builds(compiler, ["-fopenmp"], program) else []


def write_build_file(folder: Path, target: Path) -> dict[str, object]:
    """Writes ``folder/build.ninja`` for ``target`` and returns what the build report says of it."""
    import pybind11
    from ninja import ninja_syntax

    compiler, nvcc = find_compiler(), find_nvcc()
    openmp = openmp_flags(compiler)
    includes = [
        f"-I{ROOT / 'csrc'}",
        f"-isystem{pybind11.get_include()}",
        f"-isystem{sysconfig.get_paths()['include']}",
    ]
    x86 = platform.machine() in ("x86_64", "AMD64")
    instruction_sets = X86_INSTRUCTION_SETS if x86 else {"baseline": []}
    bf16_program = 'int main() { return __builtin_cpu_supports("avx512bf16"); }\n'
    has_bf16 = x86 and builds(compiler, AVX512_BF16, bf16_program)
    bf16_sources = sorted((ROOT / "csrc" / "cpu_bf16").glob("*.cpp")) if has_bf16 else []
    cuda_sources = sorted((ROOT / "csrc" / "cuda").glob("*.cu")) if nvcc else []
    flags = [*CPP_FLAGS, *openmp, *includes, *(["-DFTFAST_X86"] if x86 else [])]
    flags += ["-DFTFAST_AVX512_BF16"] if bf16_sources else []
    flags += ["-DFTFAST_CUDA"] if cuda_sources else []

    objects: list[str] = []
    with open(folder / "build.ninja", "w") as file:
        ninja = ninja_syntax.Writer(file)  # type: ignore[arg-type]  # its stubs want a str

        def compile_with(rule: str, source: Path, name: str, flags: list[str] | None = None) -> None:
            ninja.build([name], rule, [str(source)], variables={"flags": " ".join(flags or [])})
            objects.append(name)

        command = f"{shlex.join([*compiler, *flags])} -MMD -MF $out.d $flags -c $in -o $out"
        ninja.rule("cpp", command, depfile="$out.d", deps="gcc")
        for source in sorted((ROOT / "csrc").glob("*.cpp")):
            compile_with("cpp", source, f"{source.stem}.o")
        for source in sorted((ROOT / "csrc" / "cpu").glob("*.cpp")):
            for name, extra in instruction_sets.items():
                compile_with("cpp", source, f"{source.stem}.{name}.o", [f"-DFTFAST_INSTRUCTION_SET={name}", *extra])
        for source in bf16_sources:
            compile_with("cpp", source, f"{source.stem}.avx512_bf16.o", AVX512_BF16)
        link = [*compiler, "-shared", *openmp]
        if cuda_sources:
            assert nvcc is not None
            codes = [f"-gencode=arch=compute_{code},code=sm_{code}" for code in NVCC_TARGETS]
            codes.append(f"-gencode=arch=compute_{NVCC_TARGETS[-1]},code=compute_{NVCC_TARGETS[-1]}")
            command = shlex.join([nvcc, "-ccbin", compiler[-1], *NVCC_FLAGS, *codes, f"-I{ROOT / 'csrc'}"])
            ninja.rule("nvcc", f"{command} -MD -MF $out.d -c $in -o $out", depfile="$out.d", deps="gcc")
            for source in cuda_sources:
                compile_with("nvcc", source, f"{source.stem}.cuda.o")
            # The runtime linked statically: the extension then loads where there is no CUDA, and beside torch's own.
            link = [
                nvcc,
                "-ccbin",
                compiler[-1],
                "-shared",
                "-cudart",
                "static",
                *(word for flag in openmp for word in ("-Xcompiler", flag)),
            ]
        ninja.rule("link", f"{shlex.join(link)} -o $out $in")
        ninja.build([str(target)], "link", objects)
    return {
        "reason": "",
        "compiler": shlex.join(compiler),
        "openmp": bool(openmp),
        "instruction_sets": [*instruction_sets, *(["avx512_bf16"] if bf16_sources else [])],
        "cuda": [f"sm_{code}" for code in NVCC_TARGETS] if cuda_sources else [],
    }


class NinjaBuild(build_ext):
    """build_ext that hands the whole compilation to one ninja run, and keeps a report of it in the package."""

    report: dict[str, object]

    def run(self) -> None:
        super().run()
        packages = {Path(self.build_lib) / "ftfast"}
        if self.inplace or self.editable_mode:
            packages.add(ROOT / "ftfast")
        for package in packages:
            package.mkdir(parents=True, exist_ok=True)
            (package / "_build_report.json").write_text(json.dumps(self.report, indent=1) + "\n")

    def build_extension(self, ext: Extension) -> None:
        if reason := missing_tool():
            self.report = {"reason": reason}
            print(f"ftfast: {reason}.", file=sys.stderr)
            return
        target = Path(self.get_ext_fullpath(ext.name)).absolute()
        target.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(self.build_temp).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        self.report = write_build_file(folder, target)
        done = subprocess.run([sys.executable, "-m", "ninja", "-C", str(folder)], capture_output=True, text=True)
        if done.returncode:
            raise CompileError(f"ftfast's extension does not compile:\n{done.stdout}{done.stderr}")


setup(
    # optional: setuptools then accepts that no file was made where there is no compiler
    ext_modules=[Extension("ftfast._C", sources=[], optional=missing_tool() is not None)],
    cmdclass={"build_ext": NinjaBuild},
)
