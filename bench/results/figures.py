"""Figures that are derived from a record's rows: ratios within a group."""

from collections.abc import Sequence
from dataclasses import dataclass

from bench.harness.records import Row
from bench.peers import COMPILED, COPY, EAGER, YARDSTICK


@dataclass(frozen=True)
class Figures:
    """A row beside the others of its group that do the same work; None where one of the two has no figure.

    Attributes:
        over_yardstick: this row's time in multiples of the yardstick's.
        speedup_over_eager, speedup_over_compile: the peer's time in multiples of this row's.
        percent_of_ceiling: this row's GB/s in percent of the faster of copy and yardstick F, measured in the same run
            at the same size, and so from the same caches.
    """

    row: Row
    over_yardstick: float | None
    speedup_over_eager: float | None
    speedup_over_compile: float | None
    percent_of_ceiling: float | None


def best_gbps(rows: Sequence[Row]) -> float | None:
    """The highest rate of a copy or of yardstick F among rows, in GB/s."""
    found = [row.gbps for row in rows if row.candidate in (COPY, YARDSTICK)]
    return max((gbps for gbps in found if gbps is not None), default=None)


def derive(rows: list[Row]) -> list[Figures]:
    """The figures of every row."""
    by_key = {(row.bench, row.group, row.work, row.candidate): row for row in rows}
    members: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        members.setdefault((row.bench, row.group), []).append(row)
    ceilings = {key: best_gbps(of_group) for key, of_group in members.items()}

    def found(row: Row) -> Figures:
        def over(candidate: str) -> float | None:
            other = by_key.get((row.bench, row.group, row.work, candidate))
            if row.timing is None or other is None or other.timing is None:
                return None
            return row.timing.median / other.timing.median

        def speedup(candidate: str) -> float | None:
            ratio = over(candidate)
            return None if ratio is None else 1 / ratio

        ceiling = ceilings[row.bench, row.group]
        percent = None if row.gbps is None or ceiling is None else 100 * row.gbps / ceiling
        return Figures(row, over(YARDSTICK), speedup(EAGER), speedup(COMPILED), percent)

    return [found(row) for row in rows]


def groups(rows: list[Row]) -> dict[str, list[Figures]]:
    """The figures by group, in the order of the rows."""
    by_group: dict[str, list[Figures]] = {}
    for figures in derive(rows):
        by_group.setdefault(figures.row.group, []).append(figures)
    return by_group
