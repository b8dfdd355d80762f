"""Wheel, editable install and bare checkout all import; a machine without a compiler installs; broken code does not."""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

import ftfast

ROOT = Path(__file__).resolve().parents[2]


def find_compiler():
    return next((found for name in ("c++", "g++", "clang++") if (found := shutil.which(name))), None)


needs_compiler = pytest.mark.skipif(find_compiler() is None, reason="no C++ compiler here")
pytestmark = pytest.mark.xdist_group("packaging")


@pytest.fixture
def checkout(tmp_path):
    """A copy of what a clone holds, so that no build touches this one's products."""
    target = tmp_path / "check out"
    target.mkdir()
    for name in ("ftfast", "kernels", "csrc"):
        shutil.copytree(
            ROOT / name,
            target / name,
            symlinks=True,
            ignore=shutil.ignore_patterns("*.so", "_build_report.json", "__pycache__"),
        )
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in", "CITATION.cff", "CHANGELOG.md"):
        shutil.copy(ROOT / name, target / name)
    return target


def run(*command, cwd, **environment):
    clean = {
        key: value for key, value in os.environ.items() if not key.startswith(("PYTHONPATH", "FTFAST_", "TRITON_"))
    }
    return subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**clean, **environment},
        capture_output=True,
        text=True,
        timeout=600,
    )


def run_apart(*arguments, cwd, first):
    """Python with ``first`` ahead of the installed packages, and without the finder of an editable install."""
    path = os.pathsep.join([str(first), sysconfig.get_paths()["purelib"], sysconfig.get_paths()["platlib"]])
    return run(sys.executable, "-S", *arguments, cwd=cwd, PYTHONPATH=path)


QUICK_COMPILER = """#!{python} -ES
import hashlib, os, shutil, subprocess, sys
words = sys.argv[1:]
command = [{compiler!r}, *words, "-O0"]
source = words[words.index("-c") + 1] if "-c" in words else ""
checkout, found, _ = source.rpartition("/csrc/")
if not found:
    sys.exit(subprocess.run(command).returncode)
made = words[words.index("-o") + 1]
content = open(source, "rb").read()
seen = [word for word in words if word != "-DFTFAST_CUDA" or b"FTFAST_CUDA" in content]
asked = "\\0".join(seen).replace(checkout, "").encode() + content
kept = os.path.join({folder!r}, hashlib.sha1(asked).hexdigest())
if not os.path.exists(kept):
    done = subprocess.run(command).returncode
    if done:
        sys.exit(done)
    shutil.copy(made + ".d", kept + ".d")
    shutil.copy(made, kept)
shutil.copy(kept, made)
shutil.copy(kept + ".d", made + ".d")
"""


@pytest.fixture(scope="module")
def quick_compiler(tmp_path_factory):
    """Optimises nothing and compiles a source once, which is quicker; for kernels that need not be fast."""
    folder = tmp_path_factory.mktemp("objects")
    compiler = folder / "c++"
    compiler.write_text(QUICK_COMPILER.format(python=sys.executable, compiler=find_compiler(), folder=str(folder)))
    compiler.chmod(0o755)
    return str(compiler)


# nvcc takes a minute for the loss's own kernels, which test_ft_loss_cuda.py finds in the installed extension.
QUICK_CUDA = """
#include "ft_loss.h"
__global__ void probe_kernel(float* x) { x[threadIdx.x] = 1; }
extern "C" __attribute__((visibility("default"))) void probe(float* x) { probe_kernel<<<1, 1>>>(x); }
namespace ftfast::cuda {
void ft_loss_forward(const Forward&, int, void*) {}
void ft_loss_backward(const Backward&, int, void*) {}
std::string ft_loss_problem(int) { return ""; }
}  // namespace ftfast::cuda
"""


def build_wheel(checkout, source=".", **environment):
    command = [sys.executable, "-m", "pip", "wheel", source, "--no-deps", "--no-build-isolation", "-w", "wheels"]
    return run(*command, cwd=checkout, **environment)


def python_sources():
    """The package's files by the names that a wheel gives them."""
    sources = {f"ftfast/{path.relative_to(ROOT / 'ftfast')}" for path in (ROOT / "ftfast").rglob("*.py")}
    return sources | {f"ftfast/{path.relative_to(ROOT)}" for path in (ROOT / "kernels").rglob("*.py")}


IMPORT_ALL = (
    "import ftfast, ftfast.kernels.launch, ftfast.distillation.models.registry, ftfast.cli, torch\n"
    "print(ftfast.__file__, ftfast.ft_loss(torch.ones(2, 3), torch.ones(2, 3)).item())"
)


def test_a_bare_checkout_imports(checkout):
    done = run_apart("-c", IMPORT_ALL, cwd=checkout, first=checkout)
    assert done.returncode == 0, done.stderr
    assert str(checkout) in done.stdout
    info = run_apart("-m", "ftfast", "info", cwd=checkout, first=checkout)
    assert "has not been built" in info.stdout


@pytest.mark.process
def test_a_machine_without_a_compiler_installs_and_says_why(checkout):
    done = build_wheel(checkout, PATH="/nonexistent", CXX="")
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = (checkout / "wheels").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        assert not [name for name in archive.namelist() if name.endswith(".so")]
        assert {"ftfast/distillation/data/digits.npz", "ftfast/distillation/data/digits.txt"} <= set(archive.namelist())
        assert "no C++ compiler" in json.loads(archive.read("ftfast/_build_report.json"))["reason"]
        archive.extractall(checkout.parent / "site")
    site = checkout.parent / "site"
    info = run_apart("-m", "ftfast", "info", cwd=site, first=site)
    assert "no C++ compiler was found when ftfast was installed (apt-get install g++, then install" in info.stdout
    assert "--no-cache-dir" in info.stdout  # else pip gives the wheel that it built before
    assert run_apart("-c", IMPORT_ALL, cwd=site, first=site).returncode == 0


def test_the_sdist_installs_and_holds_no_part_of_the_tests(checkout):
    """setuptools took tests/test_*.py and left out what they import."""
    (checkout / "tests").mkdir()
    for name in ("test_something.py", "conftest.py", "what_tests_import.py"):
        (checkout / "tests" / name).write_text("")
    done = run(sys.executable, "setup.py", "-q", "sdist", cwd=checkout)
    assert done.returncode == 0, done.stdout + done.stderr
    (sdist,) = (checkout / "dist").glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert not [name for name in names if name.startswith("tests") or name.endswith((".pyc", ".so"))]
    compiled = {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.*") if path.is_file()}
    assert compiled | python_sources() <= names
    done = build_wheel(checkout, sdist, PATH="/nonexistent", CXX="")
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = (checkout / "wheels").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        assert python_sources() <= set(archive.namelist())


@pytest.mark.slow
@needs_compiler
def test_a_compile_error_fails_the_install(checkout):
    for source in (checkout / "csrc").glob("*.cpp"):  # whichever is compiled first
        source.write_text("this is not C++\n")
    done = build_wheel(checkout, FTFAST_CUDA="0")
    assert done.returncode != 0
    assert "ftfast's extension does not compile" in done.stdout + done.stderr
    assert not (checkout / "wheels").exists() or not list((checkout / "wheels").glob("*.whl"))


@pytest.mark.slow
@needs_compiler
def test_the_wheel_holds_everything_and_runs_its_kernels(checkout, quick_compiler):
    done = build_wheel(checkout, CXX=quick_compiler, FTFAST_CUDA="0")
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = (checkout / "wheels").glob("*.whl")
    site = checkout.parent / "site"
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        archive.extractall(site)
    assert python_sources() <= names
    assert not [name for name in names if name.startswith(("kernels/", "bench/", "tests/"))]
    assert "ftfast/py.typed" in names
    assert run_apart("-c", IMPORT_ALL, cwd=site, first=site).stdout.startswith(str(site))
    checked = run_apart("-m", "ftfast", "check", "--backend", "native", cwd=site, first=site)
    assert checked.returncode == 0, checked.stdout + checked.stderr


@pytest.mark.slow
@needs_compiler
def test_an_editable_install_imports_from_the_checkout(checkout, quick_compiler):
    venv = checkout.parent / "venv"
    run(sys.executable, "-m", "venv", "--without-pip", venv, cwd=checkout.parent)
    (site,) = venv.glob("lib/python*/site-packages")
    ours = next(path for path in sys.path if path.endswith("site-packages"))
    (site / "outer.pth").write_text(f"{ours}\n")
    pip = [sys.executable, "-m", "pip", "--python", venv / "bin" / "python", "install", "--no-deps"]
    done = run(*pip, "--no-build-isolation", "--editable", ".", cwd=checkout, CXX=quick_compiler, FTFAST_CUDA="0")
    assert done.returncode == 0, done.stdout + done.stderr
    imported = run(venv / "bin" / "python", "-c", IMPORT_ALL, cwd=checkout.parent)
    assert imported.stdout.startswith(str(checkout)), imported.stdout + imported.stderr
    assert (checkout / "ftfast" / "_build_report.json").is_file()
    assert run(venv / "bin" / "ftfast", "check", "--backend", "native", cwd=checkout.parent).returncode == 0


@pytest.mark.slow
@needs_compiler
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc here")
def test_cuda_sources_join_where_there_is_nvcc_and_load_where_there_is_no_gpu(checkout, quick_compiler):
    (checkout / "csrc" / "cuda" / "ft_loss.cu").write_text(QUICK_CUDA)
    done = build_wheel(checkout, CXX=quick_compiler)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = (checkout / "wheels").glob("*.whl")
    site = checkout.parent / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    assert json.loads((site / "ftfast" / "_build_report.json").read_text())["cuda"] == ["sm_80", "sm_90", "sm_100"]
    script = "import torch, ctypes, ftfast._C as c; assert ctypes.CDLL(c.__file__).probe; c.ft_loss_cuda_problem(0)"
    loaded = run_apart("-c", script, cwd=site, first=site)
    assert loaded.returncode == 0, loaded.stderr


def test_a_demo_installs_no_more_than_it_needs():
    """It brought Lightning, mkdocs and torchdistill."""
    wanted = {"demo": ["--editable .[distill]"], "test": ["--editable .[distill]", "ftfast[all]"]}
    for target, installed in wanted.items():
        done = run("make", "--dry-run", "VENV=/nonexistent/venv", target, cwd=ROOT)
        assert done.returncode == 0, done.stderr
        lines = [line for line in done.stdout.splitlines() if " -m pip install " in line]
        assert [line.partition("version-check ")[2].replace('"', "") for line in lines] == installed


def test_one_place_for_pins():
    """Versions stand in pyproject.toml; no requirements file, and neither setup.py nor the hooks name any."""
    assert not list(ROOT.glob("requirements*.txt"))
    assert "install_requires" not in (ROOT / "setup.py").read_text()
    assert not re.search(r"\brev:|\d+\.\d+", (ROOT / ".pre-commit-config.yaml").read_text())


def test_the_same_pythons_are_tested_and_built():
    wheels = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["cibuildwheel"]["build"]
    tests = (ROOT / ".github" / "workflows" / "tests.yml").read_text()
    tested = re.findall(r'"3\.(\d+)"', re.findall(r"^ +python: \[(.*)\]$", tests, re.MULTILINE)[0])
    assert [f"cp3{minor}-*" for minor in tested] == wheels


def test_one_version():
    """ftfast.__version__ is that of the citation and of the changelog's newest release."""
    citation = (ROOT / "CITATION.cff").read_text()
    assert re.findall(r"^version: (.*)$", citation, re.MULTILINE) == [ftfast.__version__]
    changelog = (ROOT / "CHANGELOG.md").read_text()
    headings = re.findall(r"^## (.*)$", changelog, re.MULTILINE)
    assert headings[0] == "[Unreleased]"
    assert re.fullmatch(rf"\[{re.escape(ftfast.__version__)}\]( - \d{{4}}-\d\d-\d\d)?", headings[1])
    kinds = set(re.findall(r"^### (.*)$", changelog, re.MULTILINE))
    assert kinds <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}


def test_kernels_are_reached_through_ftfast_alone():
    assert (ROOT / "ftfast" / "kernels").is_symlink()
    assert os.readlink(ROOT / "ftfast" / "kernels") == "../kernels"
    assert not (ROOT / "kernels" / "__init__.py").exists()
