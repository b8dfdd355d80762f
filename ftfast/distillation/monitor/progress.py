"""What a run says while it goes: bars with rate and time left on a terminal, a line a finished phase everywhere.

Epochs that take a while have a line each.
"""

import sys
import time
from collections.abc import Iterable, Iterator
from datetime import timedelta
from importlib.util import find_spec
from types import TracebackType
from typing import Self, TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    ProgressColumn,
    Task,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
    track,
)
from rich.progress import Progress as Bars
from rich.table import Column
from rich.text import Text

from ftfast.distillation.monitor.epochs import Epoch

Value = TypeVar("Value")
LONG_EPOCH_SECONDS = 10.0  # of these each has its line
SECONDS_OF_SILENCE = 60.0  # after which a shorter one has
STEADY_SECONDS = 600.0  # of which rate and time left are reckoned: steps of a minute, and evaluations, are in it


def epoch_line(title: str, epochs: int, record: Epoch, seconds_left: float | None) -> str:
    """An epoch in words, and the time that its phase has left."""
    terms = ", ".join(f"{name} {value:.4g}" for name, value in record.losses.items())
    loss = f"loss {sum(record.losses.values()):.4g}" + (f" ({terms})" if len(record.losses) > 1 else "")
    told = [loss]
    if record.accuracy is not None:
        top5 = "" if record.top5_accuracy is None else f" (top 5: {record.top5_accuracy:.2f} %)"
        told.append(f"{record.accuracy:.2f} %{top5} of the test images")
    told.append(f"{record.images / record.seconds:,.0f} images/s")
    if seconds_left:
        told.append(f"about {timedelta(seconds=seconds_left)} left")
    return f"{title}, epoch {record.epoch} of {epochs}: {', '.join(told)}"


class _RateColumn(ProgressColumn):
    def render(self, task: Task) -> Text:
        """Images a second."""
        return Text("" if task.speed is None or task.finished else f"{task.speed:,.0f} images/s")


def _shows_bars(console: Console) -> bool:
    """Whether it is a notebook that has widgets, or a terminal; FORCE_COLOR makes a file neither."""
    if console.is_jupyter:
        return find_spec("ipywidgets") is not None  # without, rich warns and draws nothing that moves
    return console.is_terminal and console.file.isatty()


def bar(values: Iterable[Value], title: str, steps: int) -> Iterator[Value]:
    """The values of something outside a run, with a bar on standard error; none off terminals and notebooks."""
    console = Console(stderr=True)
    shows = _shows_bars(console)
    yield from track(values, title, steps, console=console, transient=True, disable=not shows)


class Progress:
    """Bars and lines on standard error; used as a context manager, which takes the bars away at the end.

    Args:
        images: how many images all phases draw, for the outer bar.
        console: where to write; there are no bars where its file is no terminal, whatever FORCE_COLOR says of colours.
        quiet: say nothing at all.
    """

    def __init__(self, images: int, console: Console | None = None, *, quiet: bool = False) -> None:
        # On a terminal lines break between words; a log has each whole.
        self.console = console or Console(stderr=True, soft_wrap=not sys.stderr.isatty(), highlight=False, quiet=quiet)
        self._bars = Bars(
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            _RateColumn(table_column=Column(no_wrap=True)),  # a bar is one line on a narrow terminal too
            TimeRemainingColumn(),
            console=self.console,
            speed_estimate_period=STEADY_SECONDS,
            transient=True,
            disable=not _shows_bars(self.console),
        )
        self._all = self._bars.add_task("the run", total=images)
        self._phase = self._bars.add_task("", total=0, visible=False)
        self._said_at = time.monotonic()
        self._said_once: set[str] = set()

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._bars.stop()

    def begin(self, title: str, images: int) -> None:
        """A phase begins, which draws that many images."""
        self._bars.reset(self._phase, description=title, total=images, visible=True)

    def advance(self, images: int) -> None:
        """The phase has drawn that many more."""
        for task in (self._phase, self._all):
            self._bars.advance(task, images)

    def skip(self, images: int) -> None:
        """That many of the phase were drawn earlier, which says nothing of its rate."""
        for task in (self._phase, self._all):
            self._bars.reset(task, completed=round(self._task(task).completed) + images)

    def images_left(self) -> int:
        """Of the phase."""
        return round(self._task(self._phase).remaining or 0)

    def end_epoch(self, title: str, epochs: int, record: Epoch) -> None:
        """An epoch of a training is over; it has a line where it took a while, or nothing was said for long."""
        silence = time.monotonic() - self._said_at
        if record.seconds >= LONG_EPOCH_SECONDS or silence >= SECONDS_OF_SILENCE:
            self.say(epoch_line(title, epochs, record, self._task(self._phase).time_remaining))

    def end(self) -> None:
        """The phase is over, whether it drew its images or was read back."""
        self.skip(self.images_left())
        self._bars.update(self._phase, visible=False)

    def _task(self, task: TaskID) -> Task:
        return next(one for one in self._bars.tasks if one.id == task)

    def say(self, line: str) -> None:
        """One line above the bars, and into a log where there are none."""
        self._said_at = time.monotonic()
        self.console.print(line, markup=False)

    def say_once(self, line: str) -> None:
        """As :meth:`say`, whatever in the run says it again."""
        if line not in self._said_once:
            self._said_once.add(line)
            self.say(line)
