"""Every example runs, is short, and learns: its losses fall and its student is better than chance."""

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
