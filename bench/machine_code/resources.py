"""What every shipped Triton launch takes of a GPU, read from its machine code; no GPU is needed."""

import importlib.util
from collections.abc import Callable, Iterator
from itertools import islice

from rich.table import Table
from rich.text import Text

from bench.harness.measuring import raised
from bench.harness.records import Record, Row
from bench.harness.registry import Bench, Settings
from bench.machine_code import compiling, shipped
from bench.machine_code.compiling import Machine
from bench.machine_code.shipped import ShippedLaunch
from bench.results import tables

STEM = "resources"
QUICK_LAUNCHES = 1
QUICK_ARCHITECTURES = (90,)
COLUMNS = {
    "warps": "warps",
    "registers": "registers",
    "stack": "stack bytes",
    "shared": "shared bytes",
    "tensor_core_instructions": "tensor core",
    "instructions": "instructions",
}


def refuses(_: Settings) -> str:
    """Why nothing can be compiled in this process, or nothing."""
    if importlib.util.find_spec("triton") is None:
        return "resources compiles Triton kernels, and the package triton is not installed."
    if compiling.interpreting():
        return "resources compiles Triton kernels, and with TRITON_INTERPRET=1 they are interpreted; unset it."
    return ""


def work_list(settings: Settings) -> Iterator[tuple[str, ShippedLaunch, int]]:
    """``(feature, launch, architecture)`` of all that is to be compiled."""
    for feature, shipped_launches in shipped.discover().items():
        work = (
            (feature, launch, architecture)
            for launch in shipped_launches()
            for architecture in launch.architectures
            if not settings.quick or architecture in QUICK_ARCHITECTURES
        )
        yield from islice(work, QUICK_LAUNCHES if settings.quick else None)


def size(settings: Settings) -> int:
    """How often :func:`run` reports progress."""
    return sum(1 for _ in work_list(settings))


def details(machine: Machine) -> dict[str, object]:
    """The fields of a row."""
    import triton

    counted = {name: getattr(machine, name) for name in COLUMNS}
    return {**counted, "tensor_memory": machine.tensor_memory, "triton": triton.__version__}


def run(settings: Settings, advance: Callable[[str], None]) -> list[Row]:
    """Compile everything; the reason of a row says why its launch should not be shipped."""
    rows = []
    for feature, (name, launch, _, tensor_cores), architecture in work_list(settings):
        advance(f"{feature}: {name}, sm_{architecture}")
        work = f"sm_{architecture}"
        try:
            machine = compiling.compile_launch(launch, architecture)
        except Exception as error:  # The other launches are still to be compiled.
            rows.append(Row(STEM, feature, name, work, None, reason=raised(error)))
            continue
        reason = "; ".join(machine.problems(tensor_cores=tensor_cores))
        rows.append(Row(STEM, feature, name, work, None, reason=reason, details=details(machine)))
    return rows


def show(rows: list[Row]) -> Iterator[Table]:
    """One table for each feature; what is wrong is red and stands below it."""
    for feature in dict.fromkeys(row.group for row in rows):
        members = [row for row in rows if row.group == feature]
        versions = {str(row.details["triton"]) for row in members if "triton" in row.details}
        table = Table(title=f"{feature}, Triton {', '.join(sorted(versions))}", title_justify="left")
        table.add_column("launch")
        table.add_column("for", no_wrap=True)
        for heading in COLUMNS.values():
            table.add_column(heading, justify="right")
        for row in members:
            cells = [str(row.details.get(name, "")) for name in COLUMNS]
            table.add_row(row.candidate, row.work, *cells, style="red" if row.reason else "")
        wrong = [f"{row.candidate}, {row.work}: {row.reason}" for row in members if row.reason]
        if wrong:
            table.caption = Text("\n".join(wrong), style="red", justify="left")
        yield table


def markdown(newest: dict[str, tuple[str, Record]]) -> str:
    """The README's block: the largest figures of each feature, by architecture."""
    if not newest:
        return f"Resources of the Triton kernels: {tables.NOT_MEASURED}."
    _, record = max(newest.values(), key=lambda found: found[1].created)
    rows = record.of(STEM)
    lines = []
    for feature, work in dict.fromkeys((row.group, row.work) for row in rows):
        members = [row for row in rows if (row.group, row.work) == (feature, work)]
        held = [row.details for row in members if row.details]
        largest = [str(max((d[name] for d in held), default="")) for name in ("registers", "stack", "shared")]
        wrong = sum(1 for row in members if row.reason)
        lines.append([feature, work, str(len(members)), *largest, str(wrong)])
    headings = ("kernels", "for", "launches", "registers, at most", "stack bytes", "shared bytes", "not to be shipped")
    return tables.markdown_table(headings, lines, numbers_from=2)


BENCH = Bench(
    summary="registers, stack, shared memory and tensor-core instructions of every shipped Triton launch; needs no GPU",
    size=size,
    run=run,
    tables=show,
    markdown=markdown,
    refuses=refuses,
)
