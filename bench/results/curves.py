"""Scaling curves: time per sample and percent of the ceiling along each sweep of a record."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from bench.harness.records import Record, Row
from bench.results import drawing, tables, throughput
from bench.results.drawing import OURS, STYLES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.lines import Line2D


@dataclass(frozen=True)
class Point:
    """A candidate at one value of a sweep; None where there is no figure.

    Attributes:
        value: along the sweep.
        microseconds: per sample.
        percent: of the ceiling measured beside it: of the faster of copy and yardstick F in GB/s, of a head that of
            the matmul in FLOP/s.
        row: with the swept axis, its value, and what grows with it in ``details``.
    """

    value: int
    microseconds: float | None
    percent: float | None
    row: Row


def sweeps(rows: Sequence[Row]) -> dict[str, dict[str, list[Point]]]:
    """The points by sweep and candidate, along the sweep; only rows that say where in a sweep they stand."""
    swept = [row for row in rows if "sweep" in row.details]
    percents = {
        id(found.row): found.percent_of_matmul
        for members in throughput.by_group(swept, ()).values()
        for found in members
        if found.row.details.get("ceiling") == throughput.MATMUL
    }
    by_sweep: dict[str, dict[str, list[Point]]] = {}
    for found in tables.derive(swept):
        row = found.row
        if row.work not in STEPS:
            continue
        each = None if row.timing is None else 1e3 * row.timing.median / row.details["samples"]
        percent = percents.get(id(row), found.percent_of_ceiling)
        point = Point(row.details["value"], each, percent, row)
        by_sweep.setdefault(row.details["sweep"], {}).setdefault(row.candidate, []).append(point)
    for candidates in by_sweep.values():
        for points in candidates.values():
            points.sort(key=lambda point: point.value)
    return by_sweep


# The work that is drawn; a copy and a matmul are ceilings.
STEPS = ("forward+backward",)


def plot(record: Record, bench: str, paths: tuple[Path, Path]) -> list[Path]:
    """A column for each sweep: time per sample above, percent of the ceiling below."""
    found = sweeps(record.of(bench))
    with drawing.figure(3.3 * len(found) + 0.6, 6.2) as figure:
        axes = figure.subplots(2, len(found), squeeze=False, sharex="col")
        labels: dict[str, Line2D] = {}
        for column, (sweep, candidates) in enumerate(found.items()):
            above, below = axes[0][column], axes[1][column]
            for candidate, points in candidates.items():
                style = STYLES.get(candidate)
                if style is None:
                    continue
                drawn = {"color": style.colour, "marker": style.marker, "linestyle": style.line, "markersize": 4.5}
                timed = [(point.value, point.microseconds) for point in points if point.microseconds]
                (line,) = above.plot(*_columns(timed), **drawn)
                labels.setdefault(candidate, line)
                below.plot(*_columns([(point.value, point.percent) for point in points if point.percent]), **drawn)
            _guide(above, candidates.get(OURS, []))
            values = sorted({point.value for points in candidates.values() for point in points})
            above.set(xscale="log", yscale="log", title=sweep)
            below.set(xlabel=sweep.partition(":")[0])
            below.set_xticks(values, [str(value) for value in values])
            below.minorticks_off()
            below.set_ylim(bottom=0)
            below.axhline(100, color="black", linewidth=0.8)
            above.yaxis.set_major_formatter("{x:g}")
            low, high = above.get_ylim()
            above.yaxis.set_minor_formatter("{x:g}" if high < 10 * low else "")
            for one in (above, below):
                drawing.plain(one)
        axes[0][0].set_ylabel("µs per sample, log scale")
        axes[1][0].set_ylabel("% of the ceiling measured beside it")
        figure.legend(list(labels.values()), list(labels), loc="outside lower center", ncols=4, frameon=False)
        title = f"{bench}, forward and backward, medians; dotted grey: flat in N, linear in D"
        return drawing.save(figure, record, title, paths)


def _columns(pairs: Sequence[tuple[int, float | None]]) -> tuple[list[int], list[float | None]]:
    return [value for value, _ in pairs], [figure for _, figure in pairs]


def _guide(axes: "Axes", points: Sequence[Point]) -> None:
    """What proportional growth looks like, through the last point: a sample's work over the last sample's."""
    timed = [point for point in points if point.microseconds]
    if timed:
        last = timed[-1]
        work = [point.row.details["work_of_a_sample"] / last.row.details["work_of_a_sample"] for point in timed]
        expected = [(last.microseconds or 0.0) * part for part in work]
        axes.plot([point.value for point in timed], expected, color="#999999", linestyle=(0, (1, 2)), linewidth=1.2)
