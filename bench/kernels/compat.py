"""The drop-in losses of ``ftfast.compat`` against the packages and formulas that they stand in for, and what they add.

Each peer has groups of its own, with nothing but its loss and ours. The last groups are of maps so small that only
Python is timed: a drop-in class beside the bare call that it makes.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from rich.table import Table

from bench.harness.gate import FORWARD_BACKWARD, Candidate, Group
from bench.harness.measuring import measure_groups
from bench.harness.records import Record, Row
from bench.harness.registry import Bench, Settings
from bench.kernels.drop_ins import PAIRS, TINY, Pair, calls
from bench.kernels.ft_loss import dtype_name
from bench.kernels.loss_cases import FORMULA, LossCases
from bench.results import tables
from bench.shapes import SHAPES, FactorShape

STEM = "compat"
OURS = "ftfast.compat"
# The factor of ResNet-34 and ResNet-18 on ImageNet, and their maps of the stage before.
FACTOR = SHAPES["imagenet-r34-r18"]
MAPS = FactorShape("maps-r34-r18", 128, 256, 14, 14)
QUICK = SHAPES["digits-r20-r8"]
AIMED_MICROSECONDS = 30
# Of the traffic that a comparison of attention maps needs: both maps, the student's again, and its gradient.
ATTENTION_FACTORS = 4


def groups(settings: Settings) -> Iterator[Group]:
    """One for each peer, dtype and layout, and one for each bare call."""
    for pair in PAIRS:
        shape = QUICK if settings.quick else MAPS if pair.maps else FACTOR
        for dtype in settings.dtypes:
            for layout in settings.layouts:
                details = {
                    "peer": pair.title,
                    "line": pair.line,
                    "aimed": pair.aimed,
                    "dims": list(shape.dims),
                    "dtype": dtype_name(dtype),
                    "layout": layout,
                }
                build = partial(_candidates, settings, pair, shape, dtype, layout)
                yield Group(STEM, f"{pair.title}, {shape}, {dtype_name(dtype)}, {layout}", details, build)
    for bare in calls(settings.device):
        build = partial(_call_candidates, settings, bare)
        yield Group(STEM, f"beside {bare}, {TINY}", {"bare": bare, "dtype": dtype_name(torch.float32)}, build)


def _candidates(settings: Settings, pair: Pair, shape: FactorShape, dtype: torch.dtype, layout: str) -> list[Candidate]:
    cases = LossCases(shape, dtype, layout, settings.device, settings.plan.seed)
    entries = partial(
        cases.entries,
        formula=pair.formula,
        works=(FORWARD_BACKWARD,),
        moved=ATTENTION_FACTORS if pair.maps else None,
    )
    theirs = entries(pair.title, pair.theirs(), rounds_throughout=True) if _is_measured(pair, settings) else []
    return [*theirs, *entries(OURS, pair.ours())]


def _is_measured(pair: Pair, settings: Settings) -> bool:
    return not pair.package or (pair.package in settings.peers and not pair.absent())


def _call_candidates(settings: Settings, bare: str) -> list[Candidate]:
    cases = LossCases(TINY, torch.float32, "nchw", settings.device, settings.plan.seed)
    found = []
    for name, make in calls(settings.device)[bare].items():
        found += cases.entries(name, make(), formula=None, works=(FORWARD_BACKWARD,))
    return found


def size(settings: Settings) -> int:
    """How often :func:`run` reports progress."""
    count = sum(map(len, calls(settings.device).values()))
    for pair in PAIRS:
        count += (1 + _is_measured(pair, settings)) * len(settings.dtypes) * len(settings.layouts)
    return count * (1 + settings.plan.blocks)


def run(settings: Settings, advance: Callable[[str], None]) -> list[Row]:
    """Measure every group."""
    absent = {pair.title: pair.absent() for pair in PAIRS if pair.package in settings.peers}

    def not_installed(group: Group) -> Iterator[Row]:
        title = group.details.get("peer", "")
        if reason := absent.get(title):
            details = {**group.details, "not_installed": True}
            yield Row(STEM, group.name, title, FORWARD_BACKWARD, None, None, None, reason, details)

    return measure_groups(groups(settings), settings.device, settings.plan, advance, not_installed)


@dataclass(frozen=True)
class Compared:
    """A group of a peer: its row and ours, and how many times faster ours is, where both have a figure."""

    name: str
    theirs: Row | None
    ours: Row
    speedup: float | None


def compared(rows: list[Row]) -> list[Compared]:
    """The peers' groups, in the order of the rows."""
    found = []
    for ours in rows:
        if ours.candidate != OURS:
            continue
        theirs = next((row for row in rows if row.group == ours.group and row.candidate != OURS), None)
        timings = (theirs.timing if theirs else None), ours.timing
        speedup = timings[0].median / timings[1].median if timings[0] and timings[1] else None
        found.append(Compared(ours.group, theirs, ours, speedup))
    return found


def added(rows: list[Row]) -> list[tuple[str, Row, float | None]]:
    """``(bare call, row, microseconds that it takes longer than that call)``, the bare calls included."""
    bare = {row.group: row for row in rows if row.candidate == row.details.get("bare")}
    found = []
    for row in rows:
        call = bare.get(row.group)
        if call is not None:
            known = row.timing and call.timing
            more = 1e3 * (row.timing.median - call.timing.median) if known else None  # type: ignore[union-attr]
            found.append((call.candidate, row, more))
    return found


def _time(row: Row | None) -> str:
    if row is None:
        return ""
    return tables.number(row.timing.median, " ms") if row.timing else row.reason


def _lines(rows: list[Row]) -> list[tuple[str, ...]]:
    return [
        (
            each.name,
            _time(each.theirs),
            _time(each.ours),
            tables.number(each.speedup, "x"),
            "" if each.ours.details.get("aimed") is None else f"{each.ours.details['aimed']:g}x",
        )
        for each in compared(rows)
    ]


def _added_lines(rows: list[Row]) -> list[tuple[str, ...]]:
    return [
        (
            row.candidate,
            tables.number(1e3 * row.timing.median, " us") if row.timing else row.reason,
            "" if more is None or row.candidate == call else f"{more:+.1f} us",
            "" if row.candidate == call else f"{AIMED_MICROSECONDS} us",
        )
        for call, row, more in added(rows)
    ]


LOSS_HEADINGS = ("peer's loss, shape, dtype, layout", "peer", OURS, "speed-up", "aimed at")
CALL_HEADINGS = (f"call on {TINY}", "time", "more than the bare call", "at most")


def show(rows: list[Row]) -> Iterator[Table]:
    """One table of losses, and one of calls."""
    for headings, lines in ((LOSS_HEADINGS, _lines(rows)), (CALL_HEADINGS, _added_lines(rows))):
        if lines:
            table = Table(title=f"{headings[0]}, forward and backward", title_justify="left", title_style="bold")
            table.add_column(headings[0])
            for heading in headings[1:]:
                table.add_column(heading, justify="right")
            for line in lines:
                table.add_row(*line)
            yield table


def markdown(newest: dict[str, tuple[str, Record]], brief: bool = False) -> str:
    """The block of the README and of docs/benchmarks.md."""

    def found_in(_: str, record: Record) -> tuple[str, list[str]]:
        rows = record.of(STEM)
        losses = tables.markdown_table(LOSS_HEADINGS, _lines(rows), numbers_from=1)
        return ". Medians of forward and backward", [
            losses,
            tables.markdown_table(CALL_HEADINGS, _added_lines(rows), numbers_from=1),
        ]

    return tables.by_device(newest, found_in, brief)


BENCH = Bench(
    summary="the drop-in losses of ftfast.compat against the peers' own, and what a drop-in class adds to a bare call",
    size=size,
    run=run,
    tables=show,
    markdown=markdown,
    formula=FORMULA + f"; of attention maps {ATTENTION_FACTORS}*N*D*e",
)
