"""What a run says while it goes: bars with rate and time left on a terminal, a line a finished phase everywhere.

Epochs that take a while have a line each.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, ProgressColumn, Task, TaskProgressColumn, TextColumn
from rich.progress import Progress as Bars
from rich.text import Text

from ftfast.distill.monitor.epochs import Epoch

LONG_EPOCH_SECONDS = 10.0  # of these each has its line
SECONDS_OF_SILENCE = 60.0  # after which a shorter one has
RATE_SECONDS = 60.0  # of which the rate is shown
SECONDS_BETWEEN_READINGS = 0.2
STEADY_SECONDS = 600.0  # and a whole epoch at least, of which the time left is reckoned


class Pace:
    """How fast images pass: now, and over whole epochs with all that comes between their steps.

    Args:
        now: seconds, from anywhere.
    """

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._images = 0
        self._newest: tuple[float, int] | None = None
        self._readings: deque[tuple[float, int]] = deque()  # of the last steps
        self._epochs: deque[tuple[float, int]] = deque()  # their ends, the first step's before them

    def add(self, images: int) -> None:
        """That many more have passed."""
        self._images += images
        self._newest = moment, _ = self._now(), self._images
        if not self._epochs:  # the first step, which allocates and compiles, says nothing of those to come
            self._epochs.append(self._newest)
        if not self._readings or moment - self._readings[-1][0] >= SECONDS_BETWEEN_READINGS:
            self._readings.append(self._newest)
        while len(self._readings) > 2 and moment - self._readings[1][0] >= RATE_SECONDS:
            self._readings.popleft()

    def end_epoch(self) -> None:
        """An epoch is over, its evaluation too, which is no part of the rate but of the time."""
        self._readings.clear()
        self._epochs.append((self._now(), self._images))
        while len(self._epochs) > 2 and self._epochs[-1][0] - self._epochs[1][0] >= STEADY_SECONDS:
            self._epochs.popleft()

    def images_per_second(self) -> float | None:
        """Of the last minute's steps; None before there are two."""
        return None if self._newest is None or not self._readings else _rate(self._readings[0], self._newest)

    def seconds_left(self, images: int) -> float | None:
        """How long that many take, evaluations and checkpoints included; None before it can be known."""
        if self._newest is None:
            return None
        newest = max(self._newest, self._epochs[-1])
        rate = _rate(self._epochs[0], newest)
        return None if rate is None else images / rate


def _rate(start: tuple[float, int], end: tuple[float, int]) -> float | None:
    seconds, images = end[0] - start[0], end[1] - start[1]
    return images / seconds if seconds > 0 and images > 0 else None


def duration(seconds: float) -> str:
    """In the two largest units that count."""
    minutes, hours, days = round(seconds / 60), round(seconds / 3600), seconds / 86400
    if seconds < 60:
        return f"{seconds:.0f} s"
    if minutes < 60:
        return f"{minutes} min"
    if days < 1:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{hours // 24} d {hours % 24} h"


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
        told.append(f"about {duration(seconds_left)} left")
    return f"{title}, epoch {record.epoch} of {epochs}: {', '.join(told)}"


class _Column(ProgressColumn):
    """Words on a task, asked for at each drawing."""

    def __init__(self, words: Callable[[Task], str]) -> None:
        super().__init__()
        self._words = words

    def render(self, task: Task) -> Text:
        return Text(self._words(task))


def _shows_bars(console: Console) -> bool:
    """Whether it is a notebook or a terminal; FORCE_COLOR makes a file neither."""
    return console.is_jupyter or (console.is_terminal and console.file.isatty())


@contextmanager
def bar(title: str, steps: int, console: Console | None = None) -> Iterator[Callable[[], None]]:
    """A bar on standard error of something outside a run, with what advances it; none off terminals and notebooks."""
    console = console or Console(stderr=True)
    with Bars(console=console, transient=True, disable=not _shows_bars(console)) as bars:
        task = bars.add_task(title, total=steps)
        yield lambda: bars.advance(task)


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
            _Column(self._rate_in_words),
            _Column(self._time_left_in_words),
            console=self.console,
            transient=True,
            disable=not _shows_bars(self.console),
        )
        self._all = self._bars.add_task("the run", total=images)
        self._left = 0
        self._phase = self._bars.add_task("", total=None, visible=False)
        self._pace = Pace()
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
        self._left = images
        self._pace = Pace()
        self._bars.reset(self._phase, description=title, total=images, visible=True)

    def advance(self, images: int) -> None:
        """The phase has drawn that many more."""
        self._pace.add(images)
        self.skip(images)

    def skip(self, images: int) -> None:
        """That many of the phase were drawn earlier, which says nothing of its rate."""
        self._left -= images
        self._bars.advance(self._phase, images)
        self._bars.advance(self._all, images)

    def end_epoch(self, title: str, epochs: int, record: Epoch) -> None:
        """An epoch of a training is over; it has a line where it took a while, or nothing was said for long."""
        self._pace.end_epoch()
        silence = time.monotonic() - self._said_at
        if record.seconds >= LONG_EPOCH_SECONDS or silence >= SECONDS_OF_SILENCE:
            self.say(epoch_line(title, epochs, record, self._pace.seconds_left(self._left)))

    def end(self) -> None:
        """The phase is over, whether it drew its images or was read back."""
        self.skip(self._left)
        self._bars.update(self._phase, visible=False)

    def say(self, line: str) -> None:
        """One line above the bars, and into a log where there are none."""
        self._said_at = time.monotonic()
        self.console.print(line, markup=False)

    def say_once(self, line: str) -> None:
        """As :meth:`say`, whatever in the run says it again."""
        if line not in self._said_once:
            self._said_once.add(line)
            self.say(line)

    def _rate_in_words(self, task: Task) -> str:
        rate = self._pace.images_per_second()
        return "" if rate is None or task.finished else f"{rate:,.0f} images/s"

    def _time_left_in_words(self, task: Task) -> str:
        seconds = self._pace.seconds_left(round(task.remaining or 0))
        return "" if seconds is None or task.finished else f"{duration(seconds)} left"
