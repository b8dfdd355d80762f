"""How fast a training goes and where its time goes: lines of JSON beside the run, and the same for TensorBoard.

One step in many is timed part by part; on a GPU that step's parts wait for one another, so the split is of the parts
alone, while rates are of all steps as they ran.
"""

import json
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import torch

from ftfast.distill.gpu_meter import BUSY, Gpu

if TYPE_CHECKING:
    from ftfast.distill.engine import Training

PARTS = ("data", "teacher", "student", "head", "backward", "optimiser")
STEPS_BETWEEN_SAMPLES = 50
SECONDS_BETWEEN_LINES = 10.0
FILE = "telemetry.jsonl"
_OFF = nullcontext()
_timed: "StepClock | None" = None  # that of the step under way, where it is sampled


def part(name: str) -> AbstractContextManager[Any]:
    """Around one of :data:`PARTS` of a step; nothing happens in steps that are not sampled."""
    return _OFF if _timed is None else _timed.part(name)


class StepClock:
    """Mean milliseconds of a step's parts over the steps sampled."""

    def __init__(self, device: torch.device, every: int = STEPS_BETWEEN_SAMPLES) -> None:
        self._device = device
        self._every = every
        self._steps = 0
        self._sampled = 0
        self._seconds: dict[str, float] = {}

    def begin_step(self) -> None:
        """Before a step's data are asked for; the first step, which allocates and compiles, is none of the sampled."""
        global _timed
        _timed = self if self._steps % self._every == 1 % self._every else None
        self._sampled += _timed is not None
        self._steps += 1

    def end_step(self) -> None:
        """After the optimiser's step."""
        global _timed
        _timed = None

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Times what is inside."""
        start = self._now()
        try:
            yield
        finally:
            self._seconds[name] = self._seconds.get(name, 0.0) + self._now() - start

    def take(self) -> dict[str, float]:
        """Milliseconds by part, means since the last call; empty where no step was sampled."""
        seconds, count = self._seconds, self._sampled
        self._seconds, self._sampled = {}, 0
        return {name: 1e3 * seconds[name] / count for name in PARTS if name in seconds} if count else {}

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()


class RunLog:
    """Writes a training's lines into the run folder's ``telemetry.jsonl``, which a resumed run goes on with.

    A line has ``training``, ``epoch`` and ``step`` (from 1), ``seconds`` since the line before, of these
    ``images_per_second``, ``checkpoints`` written meanwhile and ``checkpoint_pause`` (their share of the time), and
    where they are known ``milliseconds`` by part and ``gpu`` (``busy_percent``, ``memory_bytes``, ``watts``,
    ``joules_per_image``).

    Args:
        folder: of the run; None writes nothing.
        title: the training's, such as ``students/ft/seed0``.
        gpu: None where there is none.
        seconds: between two lines.
    """

    def __init__(
        self,
        folder: Path | None,
        title: str,
        device: torch.device,
        gpu: Gpu | None,
        seconds: float = SECONDS_BETWEEN_LINES,
    ) -> None:
        self.clock = StepClock(device)
        self._folder, self._title, self._gpu, self._seconds = folder, title, gpu, seconds
        self._file: Any = None
        self._writer: Any = None
        self._paused, self._checkpoints = 0.0, 0
        self._images = 0
        self._since = time.perf_counter()
        self._joules = None if gpu is None else gpu.joules()

    def __enter__(self) -> Self:
        if self._folder is not None:
            path = self._folder / FILE
            _cut_half_a_line(path)
            self._file = path.open("a")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for open_one in (self._file, self._writer):
            if open_one is not None:
                open_one.close()

    def pause(self, seconds: float) -> None:
        """The training stood still that long for a checkpoint."""
        self._paused += seconds
        self._checkpoints += 1

    def step(self, training: "Training", images: int) -> None:
        """After each step, with the images of all processes in it."""
        self._images += images
        seconds = time.perf_counter() - self._since
        if self._file is None or seconds < self._seconds:
            return
        line: dict[str, Any] = {
            "time": time.time(),
            "training": self._title,
            "epoch": len(training.history) + 1,
            "step": training.steps_done(),
            "seconds": seconds,
            "images_per_second": self._images / seconds,
            "checkpoint_pause": self._paused / seconds,
            "checkpoints": self._checkpoints,
        }
        if milliseconds := self.clock.take():
            line["milliseconds"] = milliseconds
        if gpu := self._look():
            line["gpu"] = gpu
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        self._draw(line, training.total_steps_done())
        self._images, self._paused, self._checkpoints = 0, 0.0, 0
        self._since = time.perf_counter()

    def _look(self) -> dict[str, float]:
        if self._gpu is None:
            return {}
        seen, joules = self._gpu.look(), self._gpu.joules()
        found = {
            "busy_percent": seen[BUSY],
            "watts": seen["watts"],
            "memory_bytes": self._gpu.memory_used(),
            "joules_per_image": None
            if joules is None or self._joules is None
            else (joules - self._joules) / self._images,
        }
        self._joules = joules
        return {name: float(value) for name, value in found.items() if value is not None}

    def _draw(self, line: dict[str, Any], step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        assert self._folder is not None
        if self._writer is None:
            self._writer = SummaryWriter(str(self._folder / "tensorboard" / self._title), purge_step=step)
        scalars = {name: line[name] for name in ("images_per_second", "checkpoint_pause")}
        scalars.update({f"ms/{name}": value for name, value in line.get("milliseconds", {}).items()})
        scalars.update({f"gpu/{name}": value for name, value in line.get("gpu", {}).items()})
        for name, value in scalars.items():
            self._writer.add_scalar(f"steps/{name}", value, step)


def _cut_half_a_line(path: Path) -> None:
    """What a kill left of a last line would spoil the next one."""
    if not path.exists():
        return
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if whole != content:
        path.write_bytes(whole)
