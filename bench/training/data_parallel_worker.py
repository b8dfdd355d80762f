"""One of the two processes that ``bench data_parallel`` measures: steps on one core, alone, apart and joined.

The three take turns, a second at a time and in a random order in each round, so that a machine whose speed drifts is
nearly the same for all three of a round.
"""

import json
import os
import random
import sys
import time
from collections.abc import Callable

import torch

from bench.training.step_peers import CIFAR, Operands, ours
from ftfast.distillation.runtime.processes import Processes, joined

ALONE, APART, JOINED = "1 process", "2 processes apart", "2 processes"
WARMUPS = 3
STEPS = 5  # a block has so many


def main(batch: int, rounds: int, seed: int) -> None:
    """Steps on this process's ``batch`` images; the first process prints the milliseconds of each block, as JSON.

    Args:
        batch: images of a step.
        rounds: each has a block of each of the three.
        seed: of the images, the networks and the order of blocks.
    """
    cores = sorted(os.sched_getaffinity(0))
    rank = int(os.environ["LOCAL_RANK"])
    os.sched_setaffinity(0, {cores[rank % len(cores)]})
    torch.set_num_threads(1)
    with joined("cpu") as processes:
        elapsed = _measure(processes, batch, rounds, seed)
        if processes.is_first:
            print(json.dumps(elapsed))


def _measure(processes: Processes, batch: int, rounds: int, seed: int) -> dict[str, list[float]]:
    """The milliseconds of each block; what steps is gone when this returns, before the processes part."""
    operands = Operands(CIFAR, batch, torch.device("cpu"), seed)
    own, shared = ours(operands, "ft").run, ours(operands, "ft", processes).run
    for step in (own, shared):
        _milliseconds(step, WARMUPS)
    elapsed: dict[str, list[float]] = {ALONE: [], APART: [], JOINED: []}
    draw = random.Random(seed)  # the same in both
    for name in (name for _ in range(rounds) for name in draw.sample(list(elapsed), len(elapsed))):
        step = shared if name == JOINED else own
        processes.wait()
        steps = name != ALONE or processes.is_first
        elapsed[name].append(_of_all(processes, _milliseconds(step, STEPS) if steps else None))
    return elapsed


def _milliseconds(step: Callable[[], object], count: int) -> float:
    """Of a step, in a row of ``count``."""
    start = time.perf_counter()
    for _ in range(count):
        step()
    return (time.perf_counter() - start) / count * 1e3


def _of_all(processes: Processes, milliseconds: float | None) -> float:
    """What a step takes, such that all processes that stepped did as many images a second as they did together."""
    rates = processes.sum(torch.tensor([1 / milliseconds if milliseconds else 0.0, float(milliseconds is not None)]))
    return float(rates[1] / rates[0])


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
