"""What a second process with a core of its own adds to the distillation step: images a second of two over one's.

Two processes that tell each other nothing are measured too: what they lack of twice is the machine's, since both share
its memory and its clock, and what is lost from there is the distribution's.
"""

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator

from rich.table import Table

from bench.harness.machine import CHECKOUT
from bench.harness.measuring import summarise
from bench.harness.records import Record, Row
from bench.harness.registry import Bench, Settings
from bench.results import tables
from bench.training.data_parallel_worker import ALONE, APART, JOINED
from bench.training.step_peers import CIFAR

STEM = "data_parallel"
WORK = "step"
PROCESSES = {ALONE: 1, APART: 2, JOINED: 2}
BATCH, QUICK_BATCH = 64, 8  # of each process
TARGETS = {JOINED: 1.6}
OVER_ONE = "over_one_process"


def group_name(batch: int) -> str:
    """The name of the table."""
    return f"{CIFAR.title}, {batch}x3x{CIFAR.size}x{CIFAR.size} for each process, one core each, gloo"


def launches(settings: Settings) -> int:
    """How often two processes start; memory lies elsewhere each time."""
    return 1 if settings.quick else settings.plan.blocks


def run(settings: Settings, advance: Callable[[str], None]) -> list[Row]:
    """Each launch is a block of every candidate."""
    batch = QUICK_BATCH if settings.quick else BATCH
    elapsed: dict[str, list[list[float]]] = {name: [] for name in PROCESSES}
    reason = ""
    for launch in range(launches(settings)):
        advance(f"launch {launch + 1}")
        try:
            found = _launch(batch, settings, settings.plan.seed + launch)
        except RuntimeError as error:
            reason = str(error)
            continue
        for name, milliseconds in found.items():
            elapsed[name].append(milliseconds)
    return [
        Row(
            STEM,
            group_name(batch),
            name,
            WORK,
            None if reason else summarise(elapsed[name]),
            reason=reason,
            details={"processes": count, "images": batch * count}
            | ({} if reason else {OVER_ONE: count * _times_quicker(elapsed[ALONE], elapsed[name])}),
        )
        for name, count in PROCESSES.items()
    ]


def _times_quicker(alone: list[list[float]], other: list[list[float]]) -> float:
    """How many times shorter a step is, the median over rounds: the machine's speed moves less in one than in all."""
    pairs = zip((ms for launch in alone for ms in launch), (ms for launch in other for ms in launch), strict=True)
    return statistics.median(before / after for before, after in pairs)


def _launch(batch: int, settings: Settings, seed: int) -> dict[str, list[float]]:
    """Milliseconds of a step by candidate, a number for each of its turns."""
    rounds = 2 if settings.quick else 8
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    finished = subprocess.run(
        [*command, "-m", "bench.training.data_parallel_worker", str(batch), str(rounds), str(seed)],
        cwd=CHECKOUT,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    if finished.returncode != 0:
        said = [line.strip() for line in finished.stderr.splitlines() if "Error" in line]
        raise RuntimeError(f"it ends with status {finished.returncode}: {said[0] if said else 'nothing said'}")
    return {name: list(found) for name, found in json.loads(finished.stdout.splitlines()[-1]).items()}


def rates(rows: list[Row]) -> dict[str, float]:
    """Images a second by candidate, of the rows of one group."""
    return {row.candidate: row.details["images"] / row.timing.median * 1e3 for row in rows if row.timing is not None}


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
            ratio = tables.number(row.details[OVER_ONE], "x")
            aim = f"{TARGETS[row.candidate]:g}x" if row.candidate in TARGETS else ""
            table.add_row(row.candidate, tables.number(row.timing.median), f"{found[row.candidate]:,.0f}", ratio, aim)
        yield table


def markdown(newest: dict[str, tuple[str, Record]]) -> str:
    """The README's block."""
    if "cpu" not in newest:
        return f"CPU: {tables.NOT_MEASURED}."
    _, record = newest["cpu"]
    rows = [row for row in record.of(STEM) if row.group == group_name(BATCH) and OVER_ONE in row.details]
    found = rates(rows)
    if set(found) != set(PROCESSES):
        return f"CPU: {tables.NOT_MEASURED}."
    lines = [(row.candidate, f"{found[row.candidate]:,.0f}", tables.number(row.details[OVER_ONE])) for row in rows]
    measured = "medians of steps, and of the ratios of a round; apart: without a word to each other"
    head = f"CPU: {tables.provenance(record)}. {group_name(BATCH)}; {measured}."
    return head + "\n\n" + tables.markdown_table(("", "images/s", "over one process"), lines, numbers_from=1)


BENCH = Bench(
    summary="two processes with a core each against one, the distillation step through gloo",
    size=launches,
    run=run,
    tables=show,
    markdown=markdown,
)
