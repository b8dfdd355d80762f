"""Figures that are derived from a record's rows: ratios within a group."""

from dataclasses import dataclass

from bench.peers import COMPILED, COPY, EAGER, YARDSTICK
from bench.records import Row


@dataclass(frozen=True)
class Figures:
    """A row beside the others of its group that do the same work; None where one of the two has no figure.

    Attributes:
        over_yardstick: this row's time in multiples of the yardstick's.
        speedup_over_eager, speedup_over_compile: the peer's time in multiples of this row's.
        percent_of_copy: this row's GB/s in percent of a copy's, measured in the same run.
    """

    row: Row
    over_yardstick: float | None
    speedup_over_eager: float | None
    speedup_over_compile: float | None
    percent_of_copy: float | None


def derive(rows: list[Row]) -> list[Figures]:
    """The figures of every row."""
    by_key = {(row.bench, row.group, row.work, row.candidate): row for row in rows}
    copies = {(row.bench, row.group): row for row in rows if row.candidate == COPY}

    def found(row: Row) -> Figures:
        def over(candidate: str) -> float | None:
            other = by_key.get((row.bench, row.group, row.work, candidate))
            if row.timing is None or other is None or other.timing is None:
                return None
            return row.timing.median / other.timing.median

        def speedup(candidate: str) -> float | None:
            ratio = over(candidate)
            return None if ratio is None else 1 / ratio

        copy = copies.get((row.bench, row.group))
        copy_gbps = copy.gbps if copy else None
        percent = None if row.gbps is None or copy_gbps is None else 100 * row.gbps / copy_gbps
        return Figures(row, over(YARDSTICK), speedup(EAGER), speedup(COMPILED), percent)

    return [found(row) for row in rows]


def groups(rows: list[Row]) -> dict[str, list[Figures]]:
    """The figures by group, in the order of the rows."""
    by_group: dict[str, list[Figures]] = {}
    for figures in derive(rows):
        by_group.setdefault(figures.row.group, []).append(figures)
    return by_group
