"""``python -m bench compare``: ratios of two records side by side; bench/guard/command.py takes the same ratios."""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from bench.harness.records import Record, RecordError, Timing, comparable, load
from bench.peers import COPY
from bench.results.tables import number
from bench.results.throughput import GRAPHED, MATMUL

OURS = "ftfast"


class Ratio(NamedTuple):
    """What is compared: the time of a candidate of ours in multiples of a peer's that does the same work."""

    bench: str
    group: str
    work: str
    candidate: str
    peer: str


def times(record: Record, of: Callable[[Timing], float]) -> dict[tuple[str, str, str, str], float]:
    """Milliseconds by bench, group, work and candidate; a group's copy and matmul are no peers."""
    return {
        (row.bench, row.group, row.work, row.candidate): of(row.timing)
        for row in record.rows
        if row.timing is not None and row.candidate not in (COPY, MATMUL)
    }


def is_ours(candidate: str) -> bool:
    """Whether a candidate is of this package."""
    return candidate == OURS or candidate.startswith(f"{OURS}, ")


def ratios(found: dict[tuple[str, str, str, str], float]) -> dict[Ratio, float]:
    """Every candidate of ours over every peer of its group and work, CUDA graphs over CUDA graphs.

    Args:
        found: as :func:`times` has it.
    """
    by_group: dict[tuple[str, str, str], dict[str, float]] = {}
    for (bench, group, work, candidate), milliseconds in found.items():
        by_group.setdefault((bench, group, work), {})[candidate] = milliseconds
    return {
        Ratio(*key, candidate, peer): milliseconds / members[peer]
        for key, members in by_group.items()
        for candidate, milliseconds in members.items()
        if is_ours(candidate)
        for peer in members
        if not is_ours(peer) and peer.endswith(GRAPHED) == candidate.endswith(GRAPHED)
    }


def median(timing: Timing) -> float:
    """The figure that tables show."""
    return timing.median


def main(arguments: list[str]) -> int:
    """Returns 0, or exits with 2 where the records cannot be read or compared."""
    parser = argparse.ArgumentParser(
        prog="python -m bench compare",
        description="The time of ftfast in multiples of each peer's, in two records; absolute times are not compared. "
        "Records of other devices, threads, dtypes or GPU clocks, or of a throttled GPU, are refused.",
    )
    parser.add_argument("a", type=Path, metavar="A", help="a record")
    parser.add_argument("b", type=Path, metavar="B", help="another, compared with A")
    parser.add_argument("--json", action="store_true", help="print the ratios as JSON, and no table")
    options = parser.parse_args(arguments)
    try:
        a, b = load(options.a), load(options.b)
    except (OSError, RecordError, UnicodeDecodeError) as error:
        parser.error(str(error))
    if reason := comparable(a, b):
        parser.error(f"{options.a} and {options.b} cannot be compared: {reason}")
    of_a, of_b = (ratios(times(record, median)) for record in (a, b))
    shared = [ratio for ratio in of_a if ratio in of_b]
    if not shared:
        parser.error(f"{options.a} and {options.b} cannot be compared: no group has ftfast and the same peer in both.")
    if options.json:
        found = [{**ratio._asdict(), "a": of_a[ratio], "b": of_b[ratio]} for ratio in shared]
        print(json.dumps({"a": str(options.a), "b": str(options.b), "ratios": found}, indent=1, allow_nan=False))
        return 0
    table = Table(title="time in multiples of the peer's; B / A over 1 is slower in B", title_justify="left")
    for heading in ("group", "work", "candidate", "peer"):
        table.add_column(heading)
    for heading in ("A", "B", "B / A"):
        table.add_column(heading, justify="right", no_wrap=True)
    for ratio in shared:
        figures = (of_a[ratio], of_b[ratio], of_b[ratio] / of_a[ratio])
        table.add_row(ratio.group, ratio.work, ratio.candidate, ratio.peer, *map(number, figures))
    Console(width=None if sys.stdout.isatty() else 160).print(table)
    return 0
