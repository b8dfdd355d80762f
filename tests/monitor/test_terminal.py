"""What a terminal of few columns shows: whole words, and what it has no room for by name."""

from io import StringIO

import pytest
from rich.console import Console
from rich.table import Table

from ftfast.distillation.monitor.progress import Progress
from ftfast.distillation.monitor.terminal import print_fitting

HEADINGS = ("method", "accuracy, %", "x yard-\nstick", "images/s")
CELLS = ("factor transfer", "92.53 ± 1.15", "12.5", "1,491")


class Terminal(StringIO):
    def isatty(self) -> bool:
        return True


def shown(width: int) -> str:
    table = Table(title="students", box=None)
    for place, heading in enumerate(HEADINGS):
        table.add_column(heading, no_wrap=place > 0)
    table.add_row(*CELLS)
    console = Console(file=StringIO(), width=width)
    print_fitting(table, console)
    assert isinstance(console.file, StringIO)
    return console.file.getvalue()


@pytest.mark.parametrize(
    ("width", "left_out"), [(80, ""), (34, "images/s"), (26, "x yardstick, images/s"), (10, "x yardstick, images/s")]
)
def test_columns_without_room_are_named_and_no_word_of_the_others_is_broken(width: int, left_out: str) -> None:
    """The rows of a benchmark in 80 columns were "med…", "0.1…" and no names at all."""
    text = shown(width)
    assert "…" not in text or width == 10
    assert all(word in text for word in ("factor", "transfer")) or width == 10
    assert (f"A wider terminal shows: {left_out}." in " ".join(text.split())) == bool(left_out)


def test_lines_of_a_run_break_between_words_on_a_terminal_and_nowhere_in_a_log(monkeypatch: pytest.MonkeyPatch) -> None:
    line = "warning: " + "the paraphraser explains little " * 4
    for stream, lines in ((Terminal(), 2), (StringIO(), 1)):
        monkeypatch.setattr("sys.stderr", stream)
        monkeypatch.setenv("COLUMNS", "80")
        Progress(1).say(line)
        said = stream.getvalue().splitlines()
        assert len(said) == lines
        assert " ".join(" ".join(said).split()) == line.strip()
