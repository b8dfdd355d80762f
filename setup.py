"""Builds ftfast._C from csrc/ with ninja: no torch headers, so one build serves every torch version.

Without a compiler or Python.h the package installs without the extension, and without an nvcc that compiles for one of
NVCC_TARGETS without the CUDA part; ``ftfast info`` gives the reasons, kept in ``ftfast/_build_report.json``.
With them, a compile error fails the install.
"""

import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, OptionError

ROOT = Path(__file__).resolve().parent
CPP_FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math", "-Wall"]
# FP contraction is spelled out in the kernels, so that every instruction set rounds where it is told to.
CPP_FLAGS += ["-ffp-contract=off"]
NVCC_FLAGS = ["-std=c++17", "-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden", "--threads", "2"]
NVCC_TARGETS = ["80", "90", "100"]
# What csrc/cuda includes, so that a toolkit which lacks a part of it is met before the build.
NVCC_PROBE = """#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp8.h>
#include <cuda_pipeline.h>
#include <cuda_runtime.h>
__global__ void probe(float* x) { x[threadIdx.x] = 1; }
void launch(float* x) { probe<<<1, 1>>>(x); }
"""
PICTURES = (".png", ".svg", ".jpg")
# pip keeps the wheels that it builds, those without an extension too.
AGAIN = "install ftfast again with pip's --force-reinstall --no-cache-dir"

# The folders of csrc/ whose files are compiled once, for any processor.
PORTABLE = ("", "bindings", "conv3x3", "store")
# Every file of csrc/cpu is compiled once for each of these; csrc/instruction_set.cpp picks one at run time.
X86_INSTRUCTION_SETS = {
    "baseline": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c", "-mprefer-vector-width=512"],
}

# Every file of csrc/cpu_bf16 is compiled for these alone, where the compiler knows them.
AVX512_BF16 = [*X86_INSTRUCTION_SETS["avx512"], "-mavx512bf16"]

# And every file of csrc/cpu_amx for these, with the instructions that it is made of as a probe.
AMX = [*AVX512_BF16, "-mamx-tile", "-mamx-bf16"]
AMX_PROBE = """#include <immintrin.h>
void probe(const void* configuration, float* sums) {
  _tile_loadconfig(configuration);
  _tile_zero(0);
  _tile_loadd(1, sums, 64);
  _tile_loadd(2, sums, 64);
  _tile_dpbf16ps(0, 1, 2);
  _tile_stored(0, sums, 64);
  _tile_release();
}
int main() { return 0; }
"""


def find_compiler() -> list[str]:
    """The C++ compiler's command: the words of CXX, else the first of the usual names; empty where there is none."""
    try:
        words = shlex.split(os.environ.get("CXX", ""))
    except ValueError:  # a quotation that does not end
        return []
    for command in [words] if words else [["c++"], ["g++"], ["clang++"]]:
        if found := shutil.which(command[0]):
            return [found, *command[1:]]
    return []


def host_flags(compiler: list[str]) -> list[str]:
    """The compiler's command as nvcc takes it: the program, which is the last word before the options, and these."""
    count = next((place for place, word in enumerate(compiler) if word.startswith("-")), len(compiler))
    options = [flag for word in compiler[count:] for flag in ("-Xcompiler", word.replace(",", "\\,"))]
    return ["-ccbin", compiler[count - 1], *options]


def find_nvcc() -> tuple[str, str]:
    """nvcc's path and an empty text, or an empty path and why there is none; FTFAST_CUDA=0 looks for none.

    Raises:
        OptionError: FTFAST_CUDA is neither 0, 1 nor empty.
    """
    wanted, home = os.environ.get("FTFAST_CUDA", ""), os.environ.get("CUDA_HOME")
    if wanted not in ("", "0", "1"):
        raise OptionError(f"FTFAST_CUDA is {wanted!r}; it takes 0 for an install without CUDA kernels, or 1.")
    if wanted == "0":
        return "", "FTFAST_CUDA was 0 when ftfast was installed"
    nvcc = shutil.which("nvcc", path=str(Path(home) / "bin")) if home else shutil.which("nvcc")
    return nvcc or "", "" if nvcc else f"no nvcc was found in {home or 'PATH'} when ftfast was installed"


def nvcc_targets(nvcc: str, compiler: list[str]) -> tuple[list[str], str]:
    """The architectures of NVCC_TARGETS that this nvcc compiles and links for, and what it says of one it does not."""

    def problem(targets: list[str]) -> str:
        codes = [f"-gencode=arch=compute_{target},code=sm_{target}" for target in targets]
        flags = [*host_flags(compiler), *NVCC_FLAGS, *codes, "-shared", "-cudart", "static"]
        return why_not_built([nvcc], flags, NVCC_PROBE, suffix=".cu")

    problems = {target: problem([target]) for target in NVCC_TARGETS} if problem(NVCC_TARGETS) else {}
    said = [f"{nvcc} does not compile for sm_{target} ({why})" for target, why in problems.items() if why]
    return [target for target in NVCC_TARGETS if not problems.get(target)], (said or [""])[-1]


def missing_tool() -> str | None:
    """Why the extension cannot be built here, in a sentence for users; None where it can."""
    if not sys.platform.startswith("linux"):
        return f"the native kernels are built on Linux alone, and this is {platform.system()}"
    lacking, remedy = "", ""
    if not find_compiler():
        lacking, remedy = "no C++ compiler was found", "apt-get install g++"
        if given := os.environ.get("CXX"):
            lacking, remedy = f"CXX was {given!r}, which is no command,", "set it to one"
    elif not (Path(sysconfig.get_paths()["include"]) / "Python.h").is_file():
        lacking, remedy = "Python.h was missing", "apt-get install python3-dev"
    if not lacking:
        return None
    return f"{lacking} when ftfast was installed ({remedy}, then {AGAIN}), so it has no native kernels"


def why_not_built(compiler: list[str], flags: list[str], program: str, suffix: str = ".cpp") -> str:
    """Empty where the compiler makes a program of this source with these flags, else its first word on why not."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / f"probe{suffix}"
        source.write_text(program)
        command = [*compiler, *flags, str(source), "-o", str(source.with_suffix(".out"))]
        try:
            done = subprocess.run(command, capture_output=True, text=True, errors="replace")
        except OSError as error:
            return str(error)
    if not done.returncode:
        return ""
    lines = [line.strip() for line in (done.stderr + done.stdout).splitlines() if line.strip()]
    named = [line for line in lines if "error" in line.lower() or "fatal" in line.lower()]
    return (named or lines or [f"exit status {done.returncode}"])[0]


def builds(compiler: list[str], flags: list[str], program: str) -> bool:
    """Whether the compiler makes a program of this source with these flags."""
    return not why_not_built(compiler, flags, program)


def openmp_flags(compiler: list[str]) -> list[str]:
    """``-fopenmp`` where the compiler links it; without it the kernels run on one thread."""
    program = "#include <omp.h>\nint main() { return omp_get_max_threads() < 1; }\n"
    return ["-fopenmp"] if builds(compiler, ["-fopenmp"], program) else []


def write_build_file(folder: Path, target: Path) -> dict[str, object]:
    """Writes ``folder/build.ninja`` for ``target`` and returns what the build report says of it."""
    import pybind11
    from ninja import ninja_syntax

    compiler = find_compiler()
    nvcc, without_cuda = find_nvcc()
    targets, without_cuda = nvcc_targets(nvcc, compiler) if nvcc else ([], without_cuda)
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
    without_amx = why_not_built(compiler, AMX, AMX_PROBE) if has_bf16 else ""
    has_amx = has_bf16 and not without_amx
    amx_sources = sorted((ROOT / "csrc" / "cpu_amx").glob("*.cpp")) if has_amx else []
    cuda_sources = sorted((ROOT / "csrc" / "cuda").glob("*.cu")) if targets else []
    flags = [*CPP_FLAGS, *openmp, *includes, *(["-DFTFAST_X86"] if x86 else [])]
    flags += ["-DFTFAST_AVX512_BF16"] if bf16_sources else []
    flags += ["-DFTFAST_AMX"] if amx_sources else []
    flags += ["-DFTFAST_CUDA"] if cuda_sources else []

    objects: list[str] = []
    with open(folder / "build.ninja", "w") as file:
        ninja = ninja_syntax.Writer(file)  # type: ignore[arg-type]  # its stubs want a str

        def compile_with(rule: str, source: Path, name: str, flags: list[str] | None = None) -> None:
            ninja.build([name], rule, [str(source)], variables={"flags": " ".join(flags or [])})
            objects.append(name)

        command = f"{shlex.join([*compiler, *flags])} -MMD -MF $out.d $flags -c $in -o $out"
        ninja.rule("cpp", command, depfile="$out.d", deps="gcc")
        for source in sorted(path for folder in PORTABLE for path in (ROOT / "csrc" / folder).glob("*.cpp")):
            compile_with("cpp", source, f"{source.parent.name}.{source.stem}.o")
        for source in sorted((ROOT / "csrc" / "cpu").glob("*.cpp")):
            for name, extra in instruction_sets.items():
                compile_with("cpp", source, f"{source.stem}.{name}.o", [f"-DFTFAST_INSTRUCTION_SET={name}", *extra])
        for source in bf16_sources:
            compile_with("cpp", source, f"{source.stem}.avx512_bf16.o", AVX512_BF16)
        for source in amx_sources:
            compile_with("cpp", source, f"{source.stem}.amx.o", ["-DFTFAST_INSTRUCTION_SET=amx", *AMX])
        link = [*compiler, "-shared", *openmp]
        if cuda_sources:
            codes = [f"-gencode=arch=compute_{code},code=sm_{code}" for code in targets]
            codes.append(f"-gencode=arch=compute_{targets[-1]},code=compute_{targets[-1]}")
            command = shlex.join([nvcc, *host_flags(compiler), *NVCC_FLAGS, *codes, f"-I{ROOT / 'csrc'}"])
            ninja.rule("nvcc", f"{command} -MD -MF $out.d -c $in -o $out", depfile="$out.d", deps="gcc")
            for source in cuda_sources:
                compile_with("nvcc", source, f"{source.stem}.cuda.o")
            # The runtime linked statically: the extension then loads where there is no CUDA, and beside torch's own.
            link = [
                nvcc,
                *host_flags(compiler),
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
        "instruction_sets": [
            *instruction_sets,
            *(["avx512_bf16"] if bf16_sources else []),
            *(["amx"] if has_amx else []),
        ],
        "without_amx": f"{compiler[0]} does not compile for them ({without_amx})" if without_amx else "",
        "cuda": [f"sm_{code}" for code in targets] if cuda_sources else [],
        "without_cuda": without_cuda,
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


def package_page(readme: str, address: str) -> str:
    """README.md with the links and pictures of the checkout turned into absolute ones, for pages that are elsewhere.

    Args:
        readme: its text. Code in fences stays, and so do links within the page and those that are absolute.
        address: where the checkout's files are shown, such as ``https://github.com/OWNER/NAME/blob/v1.2.3``, which
            gives a file itself with ``?raw=true``; empty where there is none, and nothing is changed.
    """
    if not address:
        return readme

    def absolute(link: re.Match[str]) -> str:
        path, hash_sign, section = link[1].partition("#")
        picture = "?raw=true" if path.endswith(PICTURES) else ""
        return f"]({address.rstrip('/')}/{path}{picture}{hash_sign}{section}"

    parts = re.split(r"(^```.*?^```$)", readme, flags=re.DOTALL | re.MULTILINE)
    relative = re.compile(r"\]\((?![a-z][a-z0-9+.-]*:|#|/)([^)\s]+)")
    return "".join(part if part.startswith("```") else relative.sub(absolute, part) for part in parts)


setup(
    long_description=package_page((ROOT / "README.md").read_text("utf-8"), os.environ.get("FTFAST_PROJECT_URL", "")),
    long_description_content_type="text/markdown",
    # optional: setuptools then accepts that no file was made where there is no compiler
    ext_modules=[Extension("ftfast._C", sources=[], optional=missing_tool() is not None)],
    cmdclass={"build_ext": NinjaBuild},
)
