"""What a run says while it goes: bars with rate and time left on a terminal, one line a finished phase everywhere."""

from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, ProgressColumn, Task, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars
from rich.text import Text


class _RateColumn(ProgressColumn):
    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(f"{speed:,.0f} images/s" if speed else "")


class Progress:
    """Bars and lines on standard error; used as a context manager, which takes the bars away at the end.

    Args:
        images: how many images all phases draw, for the outer bar.
        console: where to write; there are no bars where its file is no terminal, whatever FORCE_COLOR says of colours.
        quiet: say nothing at all.
    """

    def __init__(self, images: int, console: Console | None = None, *, quiet: bool = False) -> None:
        self.console = console or Console(stderr=True, soft_wrap=True, highlight=False, quiet=quiet)
        self._bars = Bars(
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            _RateColumn(),
            TimeRemainingColumn(),
            console=self.console,
            transient=True,
            disable=not (self.console.is_terminal and self.console.file.isatty()),
        )
        self._all = self._bars.add_task("the run", total=images)
        self._left = 0
        self._phase = self._bars.add_task("", total=None, visible=False)

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._bars.stop()

    def begin(self, title: str, images: int) -> None:
        """A phase begins, which draws that many images."""
        self._left = images
        self._bars.reset(self._phase, description=title, total=images, visible=True)

    def advance(self, images: int) -> None:
        """The phase has drawn that many more."""
        self._left -= images
        self._bars.advance(self._phase, images)
        self._bars.advance(self._all, images)

    def skip(self, images: int) -> None:
        """The phase begins with that many drawn earlier, which say nothing of its rate."""
        self._left -= images
        self._bars.reset(self._phase, completed=images)
        self._bars.advance(self._all, images)

    def end(self) -> None:
        """The phase is over, whether it drew its images or was read back."""
        self.advance(self._left)
        self._bars.update(self._phase, visible=False)

    def say(self, line: str) -> None:
        """One line above the bars, and into a log where there are none."""
        self.console.print(line, markup=False)
