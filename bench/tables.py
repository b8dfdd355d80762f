"""Rows as tables, for the terminal and for Markdown."""

from collections.abc import Iterator, Sequence

from rich.table import Table
from rich.text import Text

from bench.candidates import FORWARD_BACKWARD
from bench.figures import groups
from bench.peers import COMPILED, EAGER, YARDSTICK
from bench.records import Record, Row

NOT_MEASURED = "not measured yet"
RATIOS = ("over_yardstick", "speedup_over_eager", "speedup_over_compile")


def number(value: float | None, suffix: str = "") -> str:
    """Three significant digits, or nothing."""
    if value is None:
        return ""
    digits = 0 if value >= 100 else 1 if value >= 10 else 2 if value >= 1 else 3
    return f"{value:.{digits}f}{suffix}"


def comparison_tables(rows: list[Row]) -> Iterator[Table]:
    """One table for each group; why a row has no figure stands below it."""
    for name, members in groups(rows).items():
        table = Table(title=name, title_justify="left", title_style="bold")
        table.add_column("candidate")
        table.add_column("work")
        for heading in ("median ms", "p20-p80 ms", "x yardstick", "over eager", "over compile", "GB/s", "% of copy"):
            table.add_column(heading, justify="right", no_wrap=True)
        missing: list[str] = []
        for figures in members:
            row, timing = figures.row, figures.row.timing
            if timing is None:
                table.add_row(row.candidate, row.work, Text("none", style="red"))
                missing.append(f"{row.candidate}, {row.work}: {row.reason}")
                continue
            table.add_row(
                row.candidate,
                row.work,
                number(timing.median),
                f"{number(timing.p20)}-{number(timing.p80)}",
                number(figures.over_yardstick),
                number(figures.speedup_over_eager, "x"),
                number(figures.speedup_over_compile, "x"),
                number(row.gbps),
                number(figures.percent_of_copy),
            )
        if missing:
            table.caption = Text("\n".join(missing), style="red", justify="left")
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
