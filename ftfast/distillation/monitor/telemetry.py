"""How fast a training goes and where its time goes: lines of JSON beside the run, and the same for trackers.

One step in many is timed part by part (step_clock.py); rates are of all steps as they ran.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sized
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ftfast.distillation.monitor.gpu_meter import Gpu
from ftfast.distillation.monitor.log_files import AppendedFile, add_line
from ftfast.distillation.monitor.rank_metrics import RankMetrics, gpus_of, losses_of, slowest_of, summed
from ftfast.distillation.monitor.step_clock import StepClock
from ftfast.distillation.runtime.processes import ALONE, Processes

SECONDS_BETWEEN_LINES = 10.0
FILE = "telemetry.jsonl"


class Watched(Protocol):
    """What a log asks of a training, which is an :class:`ftfast.distillation.training.loop.Training`."""

    @property
    def history(self) -> Sized:
        """The epochs that have ended."""

    def steps_done(self) -> int:
        """Steps of the epoch that is under way."""

    def total_steps_done(self) -> int:
        """Steps of all epochs."""

    def take_losses(self) -> dict[str, Tensor]:
        """What the sums of the loss terms have grown by since the last call."""

    def figures(self) -> dict[str, float]:
        """Further figures of the last step."""


class RunLog:
    """Writes a training's lines into the run folder's ``telemetry.jsonl``, which a resumed run goes on with.

    A line has ``training``, ``epoch`` and ``step`` (from 1), ``seconds`` of training since the line before, which are
    none of an evaluation, of these ``images_per_second``, ``checkpoints`` written meanwhile and ``checkpoint_pause``
    (their share of the time), ``loss`` and by term ``losses`` (means over these images), ``learning_rate`` and in
    float16 ``loss_scale``. Where they are known it has ``milliseconds`` by part (the first process's), ``gpu``
    (``busy_percent``, ``memory_bytes``, ``watts``, ``joules_per_image``), and of many processes
    ``lowest_busy_percent`` there and ``slowest_process``.

    Every process of the run has one. They tell each other their figures at steps that the first one's clock decides and
    all know beforehand, and the first one writes.

    Args:
        folder: of the run; None writes nothing.
        title: the training's, such as ``students/ft/seed0``.
        gpu: this process's; None where there is none.
        seconds: between two lines, the same in all processes.
        processes: those that train together.
        say: takes a line where the disk fails; the training goes on.
        advance: called with the images of every step.
        add_step: takes, in the first process, each line's numbers by name, the step of all epochs, and the first one of
            this log.
        counts: numbers that the caller keeps up to date; lines have their sums over the processes.
    """

    def __init__(
        self,
        folder: Path | None,
        title: str,
        device: torch.device,
        gpu: Gpu | None,
        seconds: float = SECONDS_BETWEEN_LINES,
        *,
        processes: Processes = ALONE,
        say: Callable[[str], None] = lambda _: None,
        advance: Callable[[int], None] = lambda _: None,
        add_step: Callable[[Mapping[str, float], int, int], None] = lambda values, step, first_step: None,
        counts: Mapping[str, float] | None = None,
    ) -> None:
        self.clock = StepClock(device)
        self._title, self._gpu, self._seconds, self._processes = title, gpu, seconds, processes
        self._advance, self._add_step, self._counts = advance, add_step, {} if counts is None else counts
        self._is_off = folder is None and not processes.are_many
        self._lines: AppendedFile | None = None
        if folder is not None and processes.is_first:
            self._lines = AppendedFile(folder / FILE, say)
            self._lines.cut_half_a_line()
        self._first_step = 0
        self._until_told, self._next_steps = 1, 1
        self._joules, self._joules_at = 0.0, None if gpu is None else gpu.joules()
        self._all_joules: float | None = 0.0  # of all processes at the last line
        self._elapsed, self._since = 0.0, time.perf_counter()  # of training before, and from when on
        self._start_line(self._since)

    def pause(self, seconds: float) -> None:
        """The training stood still that long for a checkpoint."""
        self._paused += seconds
        self._checkpoints += 1

    def begin_epoch(self) -> None:
        """Before an epoch's first batch is asked for; what was before is none of the training's time and energy."""
        self._since = time.perf_counter()
        self._joules_at = None if self._gpu is None else self._gpu.joules()

    def end_epoch(self, training: Watched) -> None:
        """After its last step."""
        now = time.perf_counter()
        self._elapsed, self._since = self._elapsed + now - self._since, now
        self._spend()
        self._keep(training.take_losses())

    def step(self, training: Watched, images: int) -> None:
        """After each step, with the images of all processes in it."""
        self._advance(images)
        if self._is_off:
            return
        self._images += images
        self._steps += 1
        if not self._first_step:
            self._first_step = training.total_steps_done()
        now = time.perf_counter()
        seconds = max(self._elapsed + now - self._since, 1e-9)
        if self._processes.are_many:
            self._until_told -= 1
            if self._until_told:
                return
        elif seconds < self._seconds:
            return
        self._keep(training.take_losses())
        of_all_ranks = self._processes.gather(self._tell(seconds))
        self._until_told = self._next_steps = of_all_ranks[0].next_steps
        if not of_all_ranks[0].is_due:
            return
        if self._lines is not None:
            self._write(self._lines, training, of_all_ranks, seconds)
        self._start_line(now)  # what the look at the device waited for is the next line's

    def _start_line(self, now: float) -> None:
        self._images = self._steps = self._checkpoints = 0
        self._paused = self._elapsed = 0.0
        self._since = now
        self._losses: dict[str, Tensor] = {}
        self.clock.clear()

    def _keep(self, losses: dict[str, Tensor]) -> None:
        for name, total in losses.items():
            self._losses[name] = self._losses[name] + total if name in self._losses else total

    def _spend(self) -> None:
        now = None if self._gpu is None else self._gpu.joules()
        if now is not None and self._joules_at is not None:
            self._joules += now - self._joules_at
        self._joules_at = now

    def _tell(self, seconds: float) -> RankMetrics:
        is_due = seconds >= self._seconds
        left = (0.0 if is_due else -seconds) + self._seconds
        # At most twice as many steps as before, since the first ones, which compile, say little of those to come.
        steps = math.ceil(min(left * self._steps / seconds, 2 * self._next_steps))
        losses: dict[str, float] = {}
        if self._losses:  # one look at the device for all of them
            losses = dict(zip(self._losses, torch.stack(list(self._losses.values())).tolist(), strict=True))
        gpu = {}
        if self._gpu is not None:
            self._spend()
            found = {
                "joules": None if self._joules_at is None else self._joules,
                "watts": self._gpu.watts(),
                "busy_percent": self._gpu.busy_percent(),
                "memory_bytes": self._gpu.memory_used(),
            }
            gpu = {name: float(value) for name, value in found.items() if value is not None}
        return RankMetrics(is_due, max(1, steps), losses, self.clock.means(), gpu, dict(self._counts))

    def _write(self, lines: AppendedFile, training: Watched, of_all_ranks: list[RankMetrics], seconds: float) -> None:
        loss, losses = losses_of(of_all_ranks, self._images)
        gpu, self._all_joules = gpus_of(of_all_ranks, self._all_joules, self._images)
        line: dict[str, Any] = {
            "time": time.time(),
            "training": self._title,
            "epoch": len(training.history) + 1,
            "step": training.steps_done(),
            "seconds": seconds,
            "images_per_second": self._images / seconds,
            "checkpoint_pause": self._paused / seconds,
            "checkpoints": self._checkpoints,
            **training.figures(),
        }
        known = {
            "loss": loss,
            "losses": losses,
            "milliseconds": of_all_ranks[0].milliseconds,
            "gpu": gpu,
            "slowest_process": slowest_of(of_all_ranks),
            "counts": summed([told.counts for told in of_all_ranks]),
        }
        line |= {name: value for name, value in known.items() if value not in (None, {})}
        add_line(lines, line)
        self._add_step(dict(_numbers(line)), training.total_steps_done(), self._first_step)


def _numbers(line: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """What trackers draw of a line."""
    for name, value in line.items():
        if isinstance(value, dict):
            shown = {"milliseconds": "ms", "losses": "loss"}.get(name, name)
            yield from ((f"{shown}/{part}", number) for part, number in value.items())
        elif isinstance(value, float) and name not in ("time", "seconds"):
            yield ("loss/sum" if name == "loss" else name), value
