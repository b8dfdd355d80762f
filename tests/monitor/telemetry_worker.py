"""What one of two processes of a training does for test_telemetry.py beside it: steps that only its log knows of."""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from ftfast.distillation.monitor import step_clock, telemetry
from ftfast.distillation.monitor.gpu_meter import Gpu
from ftfast.distillation.monitor.step_clock import timed
from ftfast.distillation.monitor.telemetry import RunLog
from ftfast.distillation.monitor.trackers import DEFAULT, Trackers
from ftfast.distillation.runtime.processes import Processes, joined
from tests.monitor import fake_nvml
from tests.monitor.fake_clock import FakeClock

STEPS, IMAGES = 120, 8


def train(folder: Path, processes: Processes) -> None:
    """Steps of 20 ms, most of which the first process waits; the second one's clock never calls for a line."""
    rank, clock = processes.part.rank, FakeClock()
    for module in (telemetry, step_clock, fake_nvml):
        module.time = clock  # type: ignore[attr-defined]
    nvml = fake_nvml.FakeNvml(watts=(100, 300)[rank])
    nvml.busy, nvml.memory = (100, 40)[rank], (2**30, 3 * 2**30)[rank]
    untold = 0

    def take_losses() -> dict[str, torch.Tensor]:
        nonlocal untold
        images, untold = untold, 0
        return {"labels": torch.tensor(2.0 * images / processes.part.ranks)}

    training: Any = SimpleNamespace(
        history=[],
        take_losses=take_losses,
        figures=lambda: {"learning_rate": 0.1},
    )
    counts = {"damaged": 1.0 + rank, **({"of the second": 5.0} if rank else {})}
    trackers = Trackers((DEFAULT,) if processes.is_first else (), folder)
    trackers.begin({})
    with trackers.training("teacher", {}) as tracked:
        add_step = tracked.add_step
    log = RunLog(
        folder if processes.is_first else None,
        "teacher",
        torch.device("cpu"),
        Gpu(nvml, "second"),
        seconds=(0.2, 1e9)[rank],
        processes=processes,
        add_step=add_step,
        counts=counts,
    )
    log.begin_epoch()
    begin = clock.seconds
    for step in range(1, STEPS + 1):
        training.steps_done = training.total_steps_done = lambda step=step: step
        log.clock.begin_step()
        with timed("student"):
            clock.sleep((0.005, 0.02)[rank])
        processes.sum(torch.zeros(1))
        clock.seconds = begin + 0.02 * step  # as gradients meet
        log.clock.end_step()
        untold += IMAGES
        log.step(training, IMAGES)
    log.end_epoch(training)


if __name__ == "__main__":
    with joined("cpu") as processes:
        train(Path(sys.argv[1]), processes)
