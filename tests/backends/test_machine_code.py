"""The record of machine code that was found good is of the sources as they stand, and of all that they rest on."""

import re
from pathlib import Path

import pytest

from tests import machine_code

RESOURCES = sorted(Path(__file__).parents[1].glob("*/test_*_resources.py"))
FILES = [path for path in RESOURCES if machine_code.shipped_file(path).is_file()]


@pytest.mark.parametrize("test", FILES, ids=lambda path: path.stem)
def test_every_kernel_that_is_imported_is_in_the_digest(test: Path) -> None:
    """Followed by hand from one file to the next, through every relative import of the kernels."""
    sources = machine_code.sources_of(test)
    for path in sources:
        for dots, line in re.findall(r"(?m)^from (\.+)(\w* import .*)$", path.read_text()):
            module, names = line.split(" import ")
            for name in [module] if module else names.split(", "):
                assert path.parents[len(dots) - 1] / f"{name}.py" in sources


def test_a_changed_helper_of_a_kernel_is_compiled_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    test = Path(__file__).parents[1] / "losses" / "test_ft_loss_resources.py"
    before = machine_code.digest.__wrapped__(test)
    helper = machine_code.ROOT / "kernels/loss_terms.py"
    read = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: read(path) + b"# changed\n" * (path == helper))
    assert machine_code.digest.__wrapped__(test) != before


def test_the_record_is_of_known_files() -> None:
    assert set(machine_code.recorded()) <= {path.name for path in FILES}
