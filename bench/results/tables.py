"""Rows as tables, for the terminal and for Markdown."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from rich import box
from rich.table import Table
from rich.text import Text

from bench.harness.gate import FORWARD_BACKWARD
from bench.harness.records import Record, Row
from bench.peers import COMPILED, COPY, EAGER, PEERS, YARDSTICK


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


NOT_MEASURED = "not measured yet"
OTHER_FORMULA = "other formula"
RATIOS = ("over_yardstick", "speedup_over_eager", "speedup_over_compile")


def number(value: float | None, suffix: str = "") -> str:
    """Three significant digits, or nothing."""
    if value is None:
        return ""
    digits = 0 if value >= 100 else 1 if value >= 10 else 2 if value >= 1 else 3
    return f"{value:.{digits}f}{suffix}"


def mebibytes(count: int | None) -> str:
    """Bytes as MiB."""
    if count is not None and 0 < count < 2**20 / 1000:
        return "<0.001"
    return number(None if count is None else count / 2**20)


def comparison_tables(rows: list[Row]) -> Iterator[Table]:
    """One table for each group; why a row has no figure stands below it.

    Memory is what is kept for backward, of it what lies beyond the factors themselves, and on a GPU the peak.
    """
    for name, members in groups(rows).items():
        table = Table(title=name, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
        table.add_column("candidate")
        table.add_column("work", no_wrap=True)
        headings = [
            "median\nms",
            "p20-p80\nms",
            "x yard-\nstick",
            "over\neager",
            "over\ncompile",
            "GB/s",
            "% of\nceiling",
        ]
        headings += ["saved\nMiB", "of it\nnew"]
        if has_peak := any("peak_bytes" in figures.row.details for figures in members):
            headings.append("peak\nMiB")
        for heading in headings:
            table.add_column(heading, justify="right", no_wrap=True)
        below: list[Text] = []
        for figures in members:
            row, timing = figures.row, figures.row.timing
            if timing is None:
                style = "dim" if row.details.get("not_installed") else "red"
                table.add_row(row.candidate, row.work, Text("none", style=style))
                below.append(Text(f"{row.candidate}, {row.work}: {row.reason}", style=style))
                continue
            other = "*" if row.details.get("other_formula") else ""
            table.add_row(
                row.candidate + other,
                row.work,
                number(timing.median),
                f"{number(timing.p20)}-{number(timing.p80)}",
                number(figures.over_yardstick),
                number(figures.speedup_over_eager, "x"),
                number(figures.speedup_over_compile, "x"),
                number(row.gbps),
                number(figures.percent_of_ceiling),
                mebibytes(row.details.get("saved_bytes")),
                mebibytes(row.details.get("saved_beyond_factors_bytes")),
                *([mebibytes(row.details.get("peak_bytes"))] if has_peak else []),
            )
        if any(figures.row.details.get("other_formula") for figures in members):
            below.append(Text(f"* {OTHER_FORMULA}"))
        if below:
            table.caption = Text("\n").join(below)
            table.caption.justify = "left"
        yield table


def markdown_table(headings: Sequence[str], rows: Sequence[Sequence[str]], numbers_from: int) -> str:
    """A Markdown table whose columns from ``numbers_from`` on are set to the right."""
    rule = ["---:" if column >= numbers_from else "---" for column in range(len(headings))]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (headings, rule, *rows))


def comparison_markdown(rows: list[Row], ours: str, group_names: Sequence[str]) -> str:
    """Forward and backward of ``ours`` in each group of a record; what no record has is said to be unmeasured."""
    headings = (
        *("factors, dtype, layout", EAGER, COMPILED, YARDSTICK, ours),
        *(f"{ours} / {YARDSTICK}", f"{EAGER} / {ours}", f"{COMPILED} / {ours}"),
    )
    by_group = groups(rows)
    lines = []
    for name in group_names:
        members = {
            figures.row.candidate: figures for figures in by_group.get(name, []) if figures.row.work == FORWARD_BACKWARD
        }

        def milliseconds(candidate: str, members: dict = members) -> str:
            figures = members.get(candidate)
            if figures is None:
                return NOT_MEASURED
            return number(figures.row.timing.median, " ms") if figures.row.timing else figures.row.reason

        ratios = [getattr(members.get(ours), field, None) for field in RATIOS]
        lines.append(
            [
                name,
                *(milliseconds(candidate) for candidate in (EAGER, COMPILED, YARDSTICK, ours)),
                *(NOT_MEASURED if ratio is None else number(ratio) for ratio in ratios),
            ]
        )
    return markdown_table(headings, lines, numbers_from=1)


def peers_markdown(rows: list[Row], ours: str, group_names: Sequence[str]) -> str:
    """Forward and backward of the further peers that a record has: milliseconds, and in multiples of ``ours``."""
    further = [peer.title for peer in PEERS.values() if peer.title not in (EAGER, COMPILED)]
    found = {(row.group, row.candidate): row for row in rows if row.work == FORWARD_BACKWARD}
    titles = [title for title in further if any((name, title) in found for name in group_names)]
    if not titles:
        return ""
    other = {row.candidate for row in rows if row.details.get("other_formula")}
    lines = []
    for name in group_names:
        mine = found.get((name, ours))

        def cell(title: str, name: str = name, mine: Row | None = mine) -> str:
            row = found.get((name, title))
            if row is None:
                return ""
            if row.timing is None:
                return row.reason
            ratio = f", {number(row.timing.median / mine.timing.median)}x" if mine and mine.timing else ""
            return number(row.timing.median, " ms") + ratio

        cells = [cell(title) for title in titles]
        if any(cells):
            lines.append([name, *cells])
    headings = (
        "factors, dtype, layout",
        *(f"{title} ({OTHER_FORMULA})" if title in other else title for title in titles),
    )
    return markdown_table(headings, lines, numbers_from=1)


def by_device(
    newest: dict[str, tuple[str, Record]], found_in: Callable[[str, Record], tuple[str, list[str]]], brief: bool = False
) -> str:
    """A part of Markdown for the CPU and one for GPUs, with where each was measured and the record's notes.

    Args:
        newest: a picture's link and the record, by ``"cpu"`` and ``"cuda"``.
        found_in: of a picture and a record, what its figures are, and the paragraphs that show them.
        brief: no more than the first table, and nothing of devices that were not measured.
    """
    blocks = []
    for device, title in (("cpu", "CPU"), ("cuda", "CUDA GPU")):
        if device not in newest:
            if not brief or not newest:
                blocks.append(f"{title}: {NOT_MEASURED}.")
            continue
        figures, shown = found_in(*newest[device])
        notes = "".join(f" Note: {note}." for note in newest[device][1].notes)
        blocks.append(f"{title}: {provenance(newest[device][1])}{figures}.{notes}")
        first_table = next((place for place, block in enumerate(shown) if block.startswith("|")), len(shown))
        blocks += shown[: first_table + 1] if brief else shown
    return "\n\n".join(blocks)


def provenance(record: Record) -> str:
    """Where and when a record was measured, in one line."""
    hardware, software = record.hardware, record.software
    threads = record.settings["threads"]
    on_cpu = f"{hardware['cpu']}, {threads} thread{'s' if threads > 1 else ''}"
    device = hardware.get("gpu", {}).get("name") or on_cpu
    revision = (software.get("revision") or "")[:10]
    changed = " with changes" if software.get("dirty") else ""
    at = f", revision {revision}{changed}" if revision else ""
    return f"{device}, torch {software['torch']}, {record.created[:10]}{at}"
