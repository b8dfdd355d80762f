"""Tables in Markdown."""

from collections.abc import Iterable


def markdown_table(headings: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> list[str]:
    """A table's lines."""
    cells = [headings, ("---",) * len(headings), *rows]
    return ["| " + " | ".join(row) + " |" for row in cells]
