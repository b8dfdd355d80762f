"""Machine code that was compiled and found good is not compiled again: machine_code.json says of which sources.

A file ``test_FEATURE_resources.py`` rests on itself, the feature's kernels with all that they import, its shipped
launches and tiles, and Triton's version. Where their digest is on record its tests are left out. ``pytest
--compile-again`` compiles them all the same; ``make machine-code`` does that and keeps the record of what passed.
"""

import ast
import hashlib
import json
from collections.abc import Iterator
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
RECORD = Path(__file__).with_suffix(".json")
COMPILING = ROOT / "bench/machine_code/compiling.py"
SHIPPED = ROOT / "bench/machine_code/shipped"
SHAPES = {ROOT / "bench/shapes.py", ROOT / "ftfast/commands/tune/heads.py"}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--compile-again", action="store_true", help="compile kernels whose machine code is on record too")
    parser.addoption(
        "--keep-machine-code", action="store_true", help="--compile-again, and keep the record of what passed"
    )


def shipped_file(test: Path) -> Path:
    """Where the launches of the file's feature are shipped from."""
    return SHIPPED / f"{test.stem.removeprefix('test_').removesuffix('_resources')}.py"


def kernels_imported(path: Path) -> Iterator[Path]:
    """The files of kernels/ that a file imports, as ``ftfast.kernels`` or from beside it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.ImportFrom):
            continue
        module = node.module or ""
        if node.level:
            folder = path.parents[node.level - 1]
        elif module.startswith("ftfast.kernels"):
            folder, module = ROOT / "kernels", module.removeprefix("ftfast.kernels").removeprefix(".")
        else:
            continue
        place = folder / module.replace(".", "/")
        candidates = [place.with_suffix(".py"), *(place / f"{alias.name}.py" for alias in node.names)]
        yield from (found for found in candidates if found.is_file())


@cache
def sources_of(test: Path) -> tuple[Path, ...]:
    """What the tests of a file rest on, in order."""
    waiting = [test, shipped_file(test)]
    found = {*waiting, COMPILING, SHIPPED / "__init__.py", *SHAPES}
    while waiting:
        for kernel in kernels_imported(waiting.pop()):
            if kernel not in found:
                found.add(kernel)
                waiting.append(kernel)
    return tuple(sorted(found))


@cache
def digest(test: Path) -> str:
    """SHA-256 of the sources, their names, and Triton's version."""
    found = hashlib.sha256(triton_version().encode())
    for path in sources_of(test):
        found.update(f"\0{path.relative_to(ROOT)}\0".encode() + path.read_bytes())
    return found.hexdigest()


def triton_version() -> str:
    """Triton's, or nothing where it is not installed."""
    try:
        return version("triton")
    except PackageNotFoundError:
        return ""


def recorded() -> dict[str, str]:
    """Digests by test file, of this Triton."""
    content = json.loads(RECORD.read_text()) if RECORD.is_file() else {}
    return content.get(triton_version(), {})


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--keep-machine-code") and (config.getoption("-k") or config.getoption("-m")):
        raise pytest.UsageError("--keep-machine-code keeps whole files; leave -k and -m out.")
    if config.getoption("--compile-again") or config.getoption("--keep-machine-code"):
        return
    known = recorded()
    left_out = [item for item in items if item.path.name in known and known[item.path.name] == digest(item.path)]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in set(left_out)]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if not config.getoption("--keep-machine-code"):
        return
    outcomes: dict[Path, set[str]] = {}
    for outcome, reports in terminalreporter.stats.items():
        for report in reports:
            test = ROOT / report.nodeid.partition("::")[0] if isinstance(report, pytest.TestReport) else ROOT
            if shipped_file(test).is_file():
                outcomes.setdefault(test, set()).add(outcome)
    good = {test.name: digest(test) for test, found in outcomes.items() if found <= {"passed", "skipped", ""}}
    content = json.loads(RECORD.read_text()) if RECORD.is_file() else {}
    content[triton_version()] = dict(sorted({**content.get(triton_version(), {}), **good}.items()))
    RECORD.write_text(json.dumps(content, indent=1) + "\n")
    terminalreporter.write_line(f"{RECORD.relative_to(ROOT)}: {len(good)} files kept, {len(outcomes) - len(good)} not")
