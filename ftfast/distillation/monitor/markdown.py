"""Tables in Markdown."""

from collections.abc import Iterable


def markdown_table(headings: tuple[str, ...], rows: Iterable[tuple[str, ...]], words: int | None = None) -> list[str]:
    """A table's lines; columns after the first ``words`` hold figures, set to the right, and none by default."""
    rule = tuple("---" if words is None or place < words else "---:" for place in range(len(headings)))
    cells = [headings, rule, *rows]
    return ["| " + " | ".join(row) + " |" for row in cells]
