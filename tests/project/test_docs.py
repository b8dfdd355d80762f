"""The pages of docs/: every public name is on them, their code runs, their commands exist, and the site builds."""

import argparse
import ast
import importlib
import importlib.util
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import ftfast
from ftfast.cli import COMMANDS
from tests.processes.launching import python

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(path for folder in ("", "reference", "migration") for path in (DOCS / folder).glob("*.md"))
NAMES = [str(page.relative_to(DOCS)) for page in PAGES]


def blocks(page, language):
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.DOTALL)


def shown(page):
    return set(re.findall(r"^::: (\S+)", (DOCS / page).read_text(), re.MULTILINE))


def test_every_public_name_is_on_the_api_page():
    assert shown("reference/api.md") == {f"ftfast.{name}" for name in ftfast.__all__ if name != "__version__"}


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_files_that_a_page_links_to_exist(page):
    """Three links led to where pages had lain, which the site's build tells only where its packages are installed."""
    for path in re.findall(r"\]\((?!https?:|#)([^)#\s]+)", page.read_text()):
        assert (page.parent / path).exists(), path


def test_every_peer_is_on_the_compat_page():
    folder = ROOT / "ftfast" / "compat"
    modules = [path for path in folder.glob("*.py") if path.stem != "__init__"]
    modules += [path / "__init__.py" for path in folder.iterdir() if (path / "__init__.py").is_file()]
    public = {path.parent.name if path.stem == "__init__" else path.stem for path in modules if names_all(path)}
    assert shown("reference/api_compat.md") == {f"ftfast.compat.{name}" for name in public}
    assert public <= {page.stem for page in PAGES if page.parent.name == "migration"}


def names_all(path):
    """Whether the module says which of its names are public."""
    assigned = [node.targets[0] for node in ast.parse(path.read_text()).body if isinstance(node, ast.Assign)]
    return any(isinstance(target, ast.Name) and target.id == "__all__" for target in assigned)


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_python_blocks_run_one_after_another(page):
    if page.name == "extending.md":
        pytest.skip("it adds a method, which has to be there before the settings are: the test below")
    names: dict[str, object] = {}
    for code in blocks(page, "python"):
        try:
            exec(compile(code, str(page), "exec"), names)
        except ModuleNotFoundError as error:
            if (error.name or "").split(".")[0] == "ftfast":
                raise
            pytest.skip(f"{error.name} is not installed")


@pytest.mark.process
def test_a_method_that_is_added_as_the_page_says_is_distilled_and_reported(tmp_path):
    (code,) = blocks(DOCS / "extending.md", "python")
    assert len(code.splitlines()) <= 20
    words = "--data digits --methods none,energy+kd --seeds 1 --teacher-epochs 1 --student-epochs 1 --student-images 60"
    words += f" --energy 1,2 --alpha 0.7 --device cpu --output {tmp_path / 'run'}"
    script = f"{code}\nfrom ftfast.cli import main\nraise SystemExit(main(['distill', *{words.split()!r}]))"
    done = python("-c", script)
    assert done.returncode == 0, done.stderr
    assert "energy of maps and soft labels" in (tmp_path / "run" / "report.md").read_text()


@pytest.mark.parametrize("page", [page for page in PAGES if page.parent.name == "migration"], ids=lambda it: it.stem)
def test_a_migration_page_shows_code_that_runs(page):
    assert blocks(page, "python")


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_commands_and_their_options_exist(page):
    for line in "".join(blocks(page, "sh")).splitlines():
        words = shlex.split(line, comments=True)
        if words[:1] != ["ftfast"]:
            continue
        parser = argparse.ArgumentParser(exit_on_error=False)
        importlib.import_module(COMMANDS[words[1]][1]).add_arguments(parser)
        parser.parse_args(words[2:])


@pytest.mark.parametrize("page", ["clusters.md", "photographs.md"])
def test_options_of_torchrun_and_of_the_command_behind_them_exist(page):
    from torch.distributed.run import get_args_parser

    code = "".join(blocks(DOCS / page, "sh") + blocks(DOCS / page, "bash")).replace("\\\n", "")
    found = re.findall(r"^(?:srun )?torchrun (.*?) -m ftfast (\w+)(.*?)&?$", code, re.MULTILINE)
    assert len(found) == 2
    for launch, command, words in found:
        get_args_parser().parse_args([*shlex.split(launch), "script.py"])
        parser = argparse.ArgumentParser(exit_on_error=False)
        importlib.import_module(COMMANDS[command][1]).add_arguments(parser)
        parser.parse_args(shlex.split(words))


def test_yaml_names_modules_that_exist():
    for page in PAGES:
        for name in re.findall(r"ftfast\.[\w.]+", "".join(blocks(page, "yaml"))):
            assert importlib.util.find_spec(name), name


@pytest.mark.process
def test_the_site_builds_strictly_and_loads_nothing_from_elsewhere(tmp_path):
    for package in ("mkdocs", "material", "mkdocstrings_handlers.python", "ruff"):
        pytest.importorskip(package)
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    pages = list((tmp_path / "site").rglob("*.html"))
    assert len(pages) > len(PAGES)
    for page in pages:
        text = page.read_text()
        assert not re.findall(r"<(?:script|img|iframe)[^>]*\ssrc=[\"']?(?:https?:)?//[^>]*>", text), page
        assert not re.findall(r"<link[^>]*rel=[\"']?stylesheet[^>]*href=[\"']?(?:https?:)?//[^>]*>", text), page
        assert ":class:" not in text
        assert ":func:" not in text
    api = (tmp_path / "site" / "reference" / "api" / "index.html").read_text()
    assert 'id="ftfast.FTLoss.forward"' in api
    assert "FTLoss(\n    p: int" in re.sub("<[^>]+>", "", api)  # a long signature wraps where ruff is installed
