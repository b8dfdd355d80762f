"""Every example runs, is short, and learns: its losses fall and its student is better than chance."""

import json
import re
import runpy
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "examples"
SHARED = "digits.py"
NEEDS = {
    "plain_pytorch.py": ("sklearn",),
    "cuda_graph.py": ("sklearn",),
    "lightning_module.py": ("sklearn", "lightning"),
    "accelerate_loop.py": ("sklearn", "accelerate"),
    "vit_to_vit.py": ("sklearn", "timm"),
    "vit_student.py": ("sklearn", "timm"),
    "timm_task.py": ("timm", "timm.task"),
}
LONG = ("accelerate_loop.py", "cuda_graph.py", "lightning_module.py", "timm_task.py", "vit_student.py", "vit_to_vit.py")
CHANCE = 0.25  # of the fewest labels that an example has


def losses(printed):
    """Every phase's losses in order, by its name."""
    found = {}
    for phase, values in re.findall(r"^(\w+)(?: epoch \d+)? loss (.+)$", printed, re.MULTILINE):
        found.setdefault(phase, []).extend(float(value) for value in values.split(" -> "))
    return found


def test_every_example_is_listed_and_short():
    assert {path.name for path in FOLDER.glob("*.py")} == {*NEEDS, SHARED}
    for path in FOLDER.glob("*.py"):
        assert len(path.read_text().splitlines()) < 60
        assert path.read_text().startswith('"""')


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in LONG else name for name in sorted(NEEDS)]
)
def test_its_losses_fall_and_its_student_beats_chance(name, monkeypatch, capsys):
    for package in NEEDS[name]:
        pytest.importorskip(package)
    monkeypatch.syspath_prepend(str(FOLDER))
    runpy.run_path(str(FOLDER / name), run_name="__main__")
    printed = capsys.readouterr().out
    phases = losses(printed)
    assert phases
    assert all(values[-1] < 0.7 * values[0] for values in phases.values()), phases
    assert float(re.search(r"^student accuracy (.+)$", printed, re.MULTILINE)[1]) > 2 * CHANCE


NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=[path.name for path in NOTEBOOKS])
def test_a_notebook_is_committed_without_what_a_run_leaves(path):
    cells = json.loads(path.read_text())["cells"]
    assert [cell["outputs"] for cell in cells if cell["cell_type"] == "code" and cell["outputs"]] == []
    assert {cell["execution_count"] for cell in cells if cell["cell_type"] == "code"} == {None}


@pytest.mark.process
def test_the_notebook_runs_from_top_to_bottom_and_ends_in_a_picture_of_a_comparison(monkeypatch, tmp_path):
    """In a kernel of its own, with few epochs: what its first cell of code says is replaced."""
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    for package in ("ipykernel", "sklearn"):
        pytest.importorskip(package)
    monkeypatch.setenv("PYTHONPATH", str(FOLDER.parent))
    notebook = nbformat.read(FOLDER / "first_steps.ipynb", as_version=4)
    parameters = next(cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ()))
    parameters.source = f"{parameters.source.partition('=')[0]}= 2, 200, 2, 1"
    nbclient.NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert "image/png" in outputs[-1].data
    printed = "".join(output.text for output in outputs if output.output_type == "stream")
    assert "Warning" not in str(outputs)
    assert len(re.findall(r"^(?:teacher|student): [\d.]+ %$", printed, re.MULTILINE)) == 2
