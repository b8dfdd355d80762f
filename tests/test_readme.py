"""What the README shows is what is committed: its code runs, its digits table is that of the committed run."""

import json
import re
from pathlib import Path

import torch

from ftfast.cli import COMMANDS
from ftfast.distill.report import to_markdown

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
DIGITS = ROOT / "docs" / "digits"


def test_python_blocks_run_one_after_another():
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    names: dict[str, object] = {}
    for code in blocks:
        exec(compile(code, "README.md", "exec"), names)
    assert len(blocks) >= 2
    assert torch.isfinite(names["transfer"])


def table_of(text):
    return [line for line in text.splitlines() if re.match(r"\| (method|none|ft|kd|ft\+kd) ", line)]


def test_the_digits_report_is_that_of_its_results():
    results = json.loads((DIGITS / "results.json").read_text())
    report = (DIGITS / "report.md").read_text()
    assert report == to_markdown(results)
    shown = table_of(README)
    assert len(shown) == 1 + len(results["methods"])
    assert set(shown) <= set(report.splitlines())


def test_commands_and_files_that_it_names_exist():
    for command in re.findall(r"^ftfast (\w+)", README, re.MULTILINE):
        assert command in COMMANDS
    for path in re.findall(r"\]\((?!https?:)([^)#]+)\)", README):
        assert (ROOT / path).exists(), path
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert set(re.findall(r"^make (\w+)", README, re.MULTILINE)) <= set(targets)
