"""What importing ftfast adds to ``import torch``, in fresh interpreters."""

import subprocess
import sys
from collections.abc import Callable, Iterator

from rich.table import Table
from rich.text import Text

from bench.harness.machine import CHECKOUT
from bench.harness.measuring import summarise
from bench.harness.records import Record, Row
from bench.harness.registry import Bench, Settings
from bench.results import tables

STEM = "import_time"
GROUP = "import time"
STATEMENTS = ("import torch", "import ftfast", "from ftfast import FTLoss")
# One interpreter runs the statements in turn, so each is charged with what the ones before it have not loaded.
PROGRAM = """
import time
for statement in {statements!r}:
    begin = time.perf_counter()
    exec(statement)
    print((time.perf_counter() - begin) * 1e3)
"""


def interpreters(settings: Settings) -> int:
    """How many are started; the first is a warm-up of the disk cache and is not counted."""
    return 1 + max(2, settings.plan.blocks)


def run(settings: Settings, advance: Callable[[str], None]) -> list[Row]:
    """Start the interpreters and time the statements."""
    program = PROGRAM.format(statements=STATEMENTS)
    elapsed: list[list[float]] = []
    for _ in range(interpreters(settings)):
        advance(GROUP)
        finished = subprocess.run(
            [sys.executable, "-c", program], cwd=CHECKOUT, capture_output=True, text=True, check=False
        )
        if finished.returncode != 0:
            reason = f"it raises {finished.stderr.strip().splitlines()[-1]}"
            return [Row(STEM, GROUP, statement, "import", None, reason=reason) for statement in STATEMENTS]
        elapsed.append([float(line) for line in finished.stdout.split()])
    return [
        Row(STEM, GROUP, statement, "import", summarise([[ms] for ms in column]))
        for statement, column in zip(STATEMENTS, zip(*elapsed[1:], strict=True), strict=True)
    ]


def show(rows: list[Row]) -> Iterator[Table]:
    """One table."""
    table = Table(title=f"{GROUP}, each after the ones above it", title_justify="left", title_style="bold")
    table.add_column("statement")
    for heading in ("median ms", "p20-p80 ms", "interpreters"):
        table.add_column(heading, justify="right")
    for row in rows:
        if row.timing is None:
            table.add_row(row.candidate, Text(row.reason, style="red"))
        else:
            spread = f"{tables.number(row.timing.p20)}-{tables.number(row.timing.p80)}"
            table.add_row(row.candidate, tables.number(row.timing.median), spread, str(row.timing.calls))
    yield table


def markdown(newest: dict[str, tuple[str, Record]]) -> str:
    """The README's block."""
    medians = {}
    for _, record in newest.values():
        for row in record.of(STEM):
            medians[row.candidate] = tables.number(row.timing.median, " ms") if row.timing else row.reason
    if not medians:
        return f"Import time: {tables.NOT_MEASURED}."
    ftfast_time, loss_time = (medians[statement] for statement in STATEMENTS[1:])
    return f"Added to `import torch`: `import ftfast` {ftfast_time}, then `from ftfast import FTLoss` {loss_time}."


BENCH = Bench(
    summary="what importing ftfast adds to import torch",
    size=interpreters,
    run=run,
    tables=show,
    markdown=markdown,
)
