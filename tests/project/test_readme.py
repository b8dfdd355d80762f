"""What the README and the page of results show is what is committed: code runs, tables are those of committed runs."""

import json
import re
from pathlib import Path

import pytest
import torch

from ftfast.cli import COMMANDS
from ftfast.distillation.phases.report import to_markdown
from ftfast.distillation.settings.presets import settings_of

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
RESULTS = (ROOT / "docs" / "results.md").read_text()


def test_python_blocks_run_one_after_another():
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    names: dict[str, object] = {}
    for code in blocks:
        exec(compile(code, "README.md", "exec"), names)
    assert len(blocks) >= 2
    assert torch.isfinite(names["transfer"])


def tables_of(text):
    """The tables of methods, each its lines."""
    tables = re.findall(r"^\| method \|.*\n(?:\|.*\n)+", text, re.MULTILINE)
    return [[line for line in table.splitlines() if not line.startswith("| ---")] for table in tables]


RUNS = ("digits", "fashion-mnist")  # in the page's order


@pytest.mark.parametrize("run", RUNS)
def test_a_committed_report_and_the_pages_table_are_those_of_the_runs_results(run):
    folder = ROOT / "docs" / run
    results = json.loads((folder / "results.json").read_text())
    report = (folder / "report.md").read_text()
    assert report == to_markdown(results)
    assert len(tables_of(RESULTS)) == len(RUNS)
    shown = tables_of(RESULTS)[RUNS.index(run)]
    assert len(shown) == 1 + len(results["methods"])
    assert set(shown) <= set(report.splitlines())


def test_the_fashion_mnist_run_is_that_of_its_preset():
    kept = json.loads((ROOT / "docs" / "fashion-mnist" / "settings.json").read_text())
    found = settings_of("fashion-mnist", device="cpu", dtype="bfloat16", threads=2).resolved().to_json()
    differing = {name for name in kept if kept[name] != found.get(name)}
    assert differing <= {"data_dir", "teacher_checkpoint", "paraphraser_checkpoint"}


def test_commands_and_files_that_it_names_exist():
    for command in re.findall(r"^ftfast (\w+)", README, re.MULTILINE):
        assert command in COMMANDS
    for path in re.findall(r"\]\((?!https?:)([^)#]+)\)", README):
        assert (ROOT / path).exists(), path
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert set(re.findall(r"^make (\w+)", README, re.MULTILINE)) <= set(targets)
