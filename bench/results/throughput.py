"""Figures and tables of work that is counted in FLOPs: TFLOP/s, percent of a matmul, and the floor."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from rich.table import Table
from rich.text import Text

from bench.harness.records import Row
from bench.peers import COPY
from bench.results.tables import NOT_MEASURED, markdown_table, number

MATMUL = "matmul"
GRAPHED = "CUDA graph"
RULED_OUT = (MATMUL, COPY)


@dataclass(frozen=True)
class Throughput:
    """A row beside the others of its group; None where one of the two has no figure.

    Attributes:
        tflops: 10**12 operations a second, counted from the row's FLOPs.
        percent_of_matmul: of the matmul's rate in the same group, for the same work where there is one.
        floor_ms: what the FLOPs take at the matmul's rate, or the least bytes at the copy's, whichever is longer.
        speedups: the time of each peer in multiples of this row's; a graphed row's over graphed peers.
    """

    row: Row
    tflops: float | None
    percent_of_matmul: float | None
    floor_ms: float | None
    speedups: Mapping[str, float | None]


def rate(row: Row | None) -> float | None:
    """TFLOP/s of a row that counts FLOPs."""
    if row is None or row.timing is None or "flops" not in row.details:
        return None
    return row.details["flops"] / (row.timing.median * 1e9)


def derive(rows: Sequence[Row], peers: Sequence[str]) -> list[Throughput]:
    """The figures of every row of one group."""
    by_key = {(row.candidate, row.work): row for row in rows}
    any_matmul = by_key.get((MATMUL, MATMUL))
    copy = by_key.get((COPY, COPY))

    def found(row: Row) -> Throughput:
        tflops = rate(row)
        ceiling = rate(by_key.get((MATMUL, row.work), any_matmul))
        floor = None
        if tflops and ceiling:
            floor = row.details["flops"] / (ceiling * 1e9)
            if copy is not None and copy.gbps and row.least_bytes:
                floor = max(floor, row.least_bytes / (copy.gbps * 1e6))
        variant = f", {GRAPHED}" if row.candidate.endswith(GRAPHED) else ""
        speedups = {}
        for peer in peers:
            other = by_key.get((peer + variant, row.work))
            timed = other is not None and other.timing is not None and row.timing is not None
            speedups[peer] = other.timing.median / row.timing.median if timed else None  # type: ignore[union-attr]
        percent = 100 * tflops / ceiling if tflops and ceiling else None
        return Throughput(row, tflops, percent, floor, speedups)

    return [found(row) for row in rows]


def by_group(rows: Sequence[Row], peers: Sequence[str]) -> dict[str, list[Throughput]]:
    """The figures by group, in the order of the rows."""
    names = dict.fromkeys(row.group for row in rows)
    return {name: derive([row for row in rows if row.group == name], peers) for name in names}


def throughput_tables(
    rows: list[Row], peers: Mapping[str, str], kept: Mapping[str, str] | None = None
) -> Iterator[Table]:
    """One table for each group; why a row has no figure stands below it, and what the group's ``note`` says.

    Args:
        peers: a column for the speed-up over each, by its heading.
        kept: further columns, by their heading the name of a detail in bytes.
    """
    kept = kept or {}
    for name, members in by_group(rows, list(peers.values())).items():
        table = Table(title=name, title_justify="left", title_style="bold")
        table.add_column("candidate", no_wrap=True)
        table.add_column("work", no_wrap=True)
        for heading in ("median ms", "p20-p80 ms", *peers, "TFLOP/s", "% of matmul", "floor ms", *kept):
            table.add_column(heading, justify="right", no_wrap=True)
        below: list[Text] = []
        for figures in members:
            row, timing = figures.row, figures.row.timing
            if timing is None:
                table.add_row(row.candidate, row.work, Text("none", style="red"))
                below.append(Text(f"{row.candidate}, {row.work}: {row.reason}", style="red"))
                continue
            ruled_out = row.candidate in RULED_OUT
            table.add_row(
                row.candidate,
                row.work,
                number(timing.median),
                f"{number(timing.p20)}-{number(timing.p80)}",
                *("" if ruled_out else number(ratio, "x") for ratio in figures.speedups.values()),
                number(figures.tflops),
                number(None if ruled_out else figures.percent_of_matmul),
                number(None if ruled_out else figures.floor_ms),
                *(_mebibytes(row.details.get(detail)) for detail in kept.values()),
            )
        below += [Text(note) for note in dict.fromkeys(f.row.details.get("note", "") for f in members) if note]
        if below:
            table.caption = Text("\n").join(below)
            table.caption.justify = "left"
        yield table


def _mebibytes(count: int | None) -> str:
    return number(None if count is None else count / 2**20)


def throughput_markdown(
    rows: list[Row], work: str, candidates: Sequence[str], ours: str, peers: Sequence[str], what: str
) -> str:
    """One line for each group: the candidates' medians of ``work``, ours over each peer, and its part of the matmul."""
    lines = []
    for name, members in by_group(rows, peers).items():
        found = {figures.row.candidate: figures for figures in members if figures.row.work == work}
        mine = found.get(ours)

        def milliseconds(candidate: str, found: dict[str, Throughput] = found) -> str:
            figures = found.get(candidate)
            if figures is None:
                return NOT_MEASURED
            return number(figures.row.timing.median, " ms") if figures.row.timing else figures.row.reason

        ratios = [None if mine is None else mine.speedups[peer] for peer in peers]
        percent = None if mine is None else mine.percent_of_matmul
        lines.append(
            [
                name,
                *(milliseconds(candidate) for candidate in candidates),
                *(NOT_MEASURED if ratio is None else number(ratio) for ratio in ratios),
                NOT_MEASURED if percent is None else number(percent),
            ]
        )
    headings = (what, *candidates, *(f"{peer} / {ours}" for peer in peers), f"{ours}, % of {MATMUL}")
    return markdown_table(headings, lines, numbers_from=1)
