"""Tables as a terminal has room for them."""

import sys

from rich.console import Console
from rich.table import Table

COLUMNS_IN_FILES = 140  # rich takes 80 where there is no terminal


def console_for_tables() -> Console:
    """Standard output, as wide as the terminal, or wide enough for every table where there is none."""
    return Console(width=None if sys.stdout.isatty() else COLUMNS_IN_FILES)


def print_fitting(table: Table, console: Console, fewest: int = 2) -> None:
    """Prints a table whose columns keep their words whole: those without room are left out from the right, and named.

    Args:
        fewest: columns that stay, however narrow the terminal.
    """
    left_out: list[str] = []
    while len(table.columns) > fewest and _cuts_words(table, console):
        left_out.insert(0, str(table.columns.pop().header).replace("-\n", "").replace("\n", " "))
    console.print(table)
    if left_out:
        console.print(f"A wider terminal shows: {', '.join(left_out)}.", markup=False, highlight=False)


def _cuts_words(table: Table, console: Console) -> bool:
    """Whether rich has to shorten a word, or leaves a column no room at all."""
    shown = "\n".join("".join(segment.text for segment in line) for line in console.render_lines(table)).split()
    words = (word for column in table.columns for cell in (column.header, *column.cells) for word in str(cell).split())
    return not set(words) <= set(shown)
