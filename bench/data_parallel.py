"""What a second process with a core of its own adds to the distillation step: images a second of two over one's."""

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator

from rich.table import Table

from bench import tables
from bench.machine import CHECKOUT
from bench.measuring import summarise
from bench.records import Record, Row
from bench.registry import Bench, Settings
from bench.step_peers import CIFAR

STEM = "data_parallel"
WORK = "step"
COUNTS = (1, 2)
BATCH, QUICK_BATCH = 64, 8  # of each process
TARGET = 1.6


def group_name(batch: int) -> str:
    """The name of the table."""
    return f"{CIFAR.title}, {batch}x3x{CIFAR.size}x{CIFAR.size} for each process, one core each, gloo"


def candidate_name(count: int) -> str:
    return f"{count} process{'es' * (count > 1)}"


def blocks(settings: Settings) -> int:
    """Launches of each."""
    return max(1, settings.plan.blocks // 2)


def run(settings: Settings, advance: Callable[[str], None]) -> list[Row]:
    """Launch one and two processes in random order, each launch a block."""
    batch = QUICK_BATCH if settings.quick else BATCH
    order = [count for count in COUNTS for _ in range(blocks(settings))]
    random.Random(settings.plan.seed).shuffle(order)
    elapsed: dict[int, list[list[float]]] = {count: [] for count in COUNTS}
    reasons: dict[int, str] = {}
    for count in order:
        advance(candidate_name(count))
        try:
            elapsed[count].append(_launch(count, batch, settings))
        except RuntimeError as error:
            reasons[count] = str(error)
    return [
        Row(
            STEM,
            group_name(batch),
            candidate_name(count),
            WORK,
            summarise(elapsed[count]) if count not in reasons else None,
            reason=reasons.get(count, ""),
            details={"processes": count, "images": batch * count},
        )
        for count in COUNTS
    ]


def _launch(count: int, batch: int, settings: Settings) -> list[float]:
    """Milliseconds of steps, as the first process saw them."""
    seconds = 1.0 if settings.quick else max(3.0, 2 * settings.plan.block_seconds)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    worker = ["-m", "bench.data_parallel_worker", str(batch), str(seconds), str(settings.plan.seed)]
    finished = subprocess.run(
        [*command, *worker],
        cwd=CHECKOUT,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    if finished.returncode != 0:
        said = [line.strip() for line in finished.stderr.splitlines() if "Error" in line]
        raise RuntimeError(f"it ends with status {finished.returncode}: {said[0] if said else 'nothing said'}")
    return [float(ms) for ms in json.loads(finished.stdout.splitlines()[-1])]


def rates(rows: list[Row]) -> dict[int, float]:
    """Images a second by number of processes, of the rows of one group."""
    return {
        row.details["processes"]: row.details["images"] / row.timing.median * 1e3
        for row in rows
        if row.timing is not None
    }


def show(rows: list[Row]) -> Iterator[Table]:
    """One table."""
    for name in dict.fromkeys(row.group for row in rows):
        members = [row for row in rows if row.group == name]
        table = Table(title=name, title_justify="left", title_style="bold")
        table.add_column("candidate")
        for heading in ("median ms", "images/s", "over one process", "aimed at"):
            table.add_column(heading, justify="right")
        found = rates(members)
        for row in members:
            if row.timing is None:
                table.add_row(row.candidate, row.reason)
                continue
            count = row.details["processes"]
            ratio = tables.number(found[count] / found[1], "x") if 1 in found else ""
            aim = f"{TARGET:g}x" if count == 2 else ""
            table.add_row(row.candidate, tables.number(row.timing.median), f"{found[count]:,.0f}", ratio, aim)
        yield table


def markdown(newest: dict[str, tuple[str, Record]]) -> str:
    """The README's block."""
    if "cpu" not in newest:
        return f"CPU: {tables.NOT_MEASURED}."
    _, record = newest["cpu"]
    rows = [row for row in record.of(STEM) if row.group == group_name(BATCH)]
    found = rates(rows)
    if set(found) != set(COUNTS):
        return f"CPU: {tables.NOT_MEASURED}."
    over_one = {count: tables.number(found[count] / found[1]) for count in COUNTS}
    lines = [(candidate_name(count), f"{found[count]:,.0f}", over_one[count]) for count in COUNTS]
    head = f"CPU: {tables.provenance(record)}. {group_name(BATCH)}; medians of steps."
    return head + "\n\n" + tables.markdown_table(("", "images/s", "over one process"), lines, numbers_from=1)


BENCH = Bench(
    summary="two processes with a core each against one, the distillation step through gloo",
    size=lambda settings: len(COUNTS) * blocks(settings),
    run=run,
    tables=show,
    markdown=markdown,
)
