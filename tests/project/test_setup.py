"""setup.py on machines with other compilers than this one's: what is built, and the reason kept where it is not."""

import re
import runpy
from pathlib import Path

import pytest
import setuptools

from ftfast.cli import main
from ftfast.commands import info

ROOT = Path(__file__).resolve().parents[2]
WRITES_OUTPUT = 'while [ $# -gt 1 ]; do [ "$1" = -o ] && : > "$2"; shift; done'
OLD_NVCC = (
    'case "$*" in *compute_100*) echo "nvcc fatal   : Unsupported gpu architecture \'compute_100\'" >&2; exit 1;; esac'
)


@pytest.fixture
def scripts(tmp_path, monkeypatch):
    """A folder that is all of PATH, with a C++ compiler that makes every program."""
    folder = tmp_path / "bin"
    folder.mkdir()
    write(folder / "g++", WRITES_OUTPUT)
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.setenv("CXX", "g++")
    for name in ("CUDA_HOME", "FTFAST_CUDA"):
        monkeypatch.delenv(name, raising=False)
    return folder


@pytest.fixture(scope="module")
def setup():
    """The names of setup.py, which installs nothing here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setuptools, "setup", lambda **arguments: None)
        return runpy.run_path(str(ROOT / "setup.py"))


@pytest.fixture
def build(setup, tmp_path):
    """Writes the build file, and gives it and the report; nothing is compiled."""

    def write_build_file():
        report = setup["write_build_file"](tmp_path, tmp_path / "_C.so")
        return re.sub(r"\$\n\s+", "", (tmp_path / "build.ninja").read_text()), report

    return write_build_file


def write(path, *lines):
    path.write_text("\n".join(("#!/bin/sh", *lines)) + "\n")
    path.chmod(0o755)


ADDRESS = "https://example.org/owner/name/blob/v1.2.3"


def test_a_package_page_has_no_relative_link_left(setup):
    readme = (ROOT / "README.md").read_text()
    page = setup["package_page"](readme, ADDRESS)
    targets = re.findall(r"\]\(([^)\s]+)", page)
    assert all(target.startswith(("https://", "#")) for target in targets)
    assert f"]({ADDRESS}/docs/digits/curves.png?raw=true)" in page
    own = [target.removeprefix(f"{ADDRESS}/").partition("?")[0] for target in targets if target.startswith(ADDRESS)]
    assert own
    assert all((ROOT / path.partition("#")[0]).exists() for path in own)
    assert setup["package_page"](readme, "") == readme


def test_a_package_page_keeps_code_sections_and_what_is_absolute(setup):
    text = (
        '[a](a.md#part) [b](#b) [c](https://c) [d](mailto:d@e) [![e](e.svg)](f/)\n```md\n[g](g.md)\n```\n[h](h "H")\n'
    )
    assert setup["package_page"](text, f"{ADDRESS}/") == (
        f"[a]({ADDRESS}/a.md#part) [b](#b) [c](https://c) [d](mailto:d@e) "
        f'[![e]({ADDRESS}/e.svg?raw=true)]({ADDRESS}/f/)\n```md\n[g](g.md)\n```\n[h]({ADDRESS}/h "H")\n'
    )


def test_an_nvcc_older_than_an_architecture_builds_for_those_it_knows(scripts, build):
    """The whole install failed at sm_100."""
    write(scripts / "nvcc", OLD_NVCC, WRITES_OUTPUT)
    ninja, report = build()
    assert report["cuda"] == ["sm_80", "sm_90"]
    assert "sm_100 (nvcc fatal   : Unsupported gpu architecture 'compute_100')" in report["without_cuda"]
    assert "arch=compute_90,code=compute_90" in ninja  # from which a newer GPU's driver compiles
    assert "100" not in ninja
    assert "-DFTFAST_CUDA" in ninja


def test_an_nvcc_that_builds_nothing_leaves_the_cuda_part_out(scripts, build):
    write(scripts / "nvcc", 'echo "error: unsupported GNU version" >&2', "exit 1")
    ninja, report = build()
    assert report["cuda"] == []
    assert "error: unsupported GNU version" in report["without_cuda"]
    assert "bin/nvcc" not in ninja
    assert "-DFTFAST_CUDA" not in ninja


@pytest.mark.parametrize(
    ("variables", "reason"),
    [
        ({}, "no nvcc was found in PATH"),
        ({"FTFAST_CUDA": "0"}, "FTFAST_CUDA was 0"),
        ({"CUDA_HOME": "/nowhere"}, "no nvcc was found in /nowhere"),
    ],
)
def test_a_build_without_cuda_keeps_why(scripts, build, monkeypatch, variables, reason):
    if variables:
        write(scripts / "nvcc", WRITES_OUTPUT)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    ninja, report = build()
    assert report["cuda"] == []
    assert report["without_cuda"] == f"{reason} when ftfast was installed"
    assert "bin/nvcc" not in ninja


@pytest.mark.parametrize(
    ("compiler", "flags"),
    [
        ("g++ -m64 -Wa,--noexecstack", "-ccbin {}/g++ -Xcompiler -m64 -Xcompiler '-Wa\\,--noexecstack'"),
        ("ccache g++", "-ccbin g++"),
        ("g++", "-ccbin {}/g++"),
    ],
)
def test_nvcc_is_given_the_compiler_and_its_options_apart(scripts, build, monkeypatch, compiler, flags):
    """CXX="g++ -m64" became -ccbin -m64."""
    write(scripts / "nvcc", WRITES_OUTPUT)
    write(scripts / "ccache", 'exec "$@"')
    monkeypatch.setenv("CXX", compiler)
    ninja, report = build()
    assert report["cuda"] == ["sm_80", "sm_90", "sm_100"]
    commands = [line for line in ninja.splitlines() if "bin/nvcc" in line]
    assert len(commands) == 2
    assert all(f"nvcc {flags.format(scripts)} -" in line for line in commands)


def test_a_compiler_without_matrix_tiles_leaves_them_out_and_says_why(setup, scripts, build, monkeypatch):
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    _, report = build()
    assert (report["instruction_sets"][-1], report["without_amx"]) == ("amx", "")
    unknown = 'case "$*" in *-mamx-*) echo "error: unrecognized option -mamx-tile" >&2; exit 1;; esac'
    write(scripts / "g++", unknown, WRITES_OUTPUT)
    ninja, report = build()
    assert report["instruction_sets"][-1] == "avx512_bf16"
    assert report["without_amx"].endswith("g++ does not compile for them (error: unrecognized option -mamx-tile)")
    assert "mamx" not in ninja
    assert "-DFTFAST_AMX" not in ninja


def test_an_unknown_ftfast_cuda_is_one_sentence(scripts, build, monkeypatch):
    monkeypatch.setenv("FTFAST_CUDA", "off")
    with pytest.raises(setuptools.errors.OptionError, match=r"^FTFAST_CUDA is 'off'; it takes 0 .* or 1\.$"):
        build()


@pytest.mark.parametrize(
    ("compiler", "reason"), [("", "no C++ compiler was found"), ("nothing", "CXX was 'nothing'"), ('g++ "', "CXX was")]
)
def test_the_advice_to_install_again_passes_by_pips_cache(setup, monkeypatch, compiler, reason):
    monkeypatch.setenv("PATH", "/nonexistent")
    monkeypatch.setenv("CXX", compiler)
    said = setup["missing_tool"]()
    assert reason in said
    assert "--no-cache-dir" in said


def test_other_systems_get_no_extension(setup, monkeypatch):
    monkeypatch.setattr("sys.platform", "win32")
    assert "built on Linux alone" in setup["missing_tool"]()
    assert "Operating System :: POSIX :: Linux" in (ROOT / "pyproject.toml").read_text()


def test_info_shows_why_there_is_no_cuda_part(monkeypatch, capsys):
    report = {"reason": "", "cuda": [], "without_cuda": "/usr/bin/nvcc does not compile for sm_100 (fatal)"}
    monkeypatch.setattr(info, "build_report", lambda: report)
    monkeypatch.setattr(info, "load_extension", lambda: (object(), "compiled extension"))
    assert main(["info"]) == 0
    assert "without cuda: /usr/bin/nvcc does not compile for sm_100 (fatal)" in capsys.readouterr().out
