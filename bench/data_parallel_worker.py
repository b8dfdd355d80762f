"""One of the processes that ``bench data_parallel`` measures: steps on one core, their milliseconds as JSON."""

import json
import os
import sys
import time

import torch

from bench.step_peers import CIFAR, Operands, ours
from ftfast.distill.processes import joined

WARMUPS = 3
STEPS = 5  # between two looks at the clock, which all processes have to agree on


def main(batch: int, seconds: float, seed: int) -> None:
    """Steps on this process's ``batch`` images until the seconds are over; the first process prints."""
    cores = sorted(os.sched_getaffinity(0))
    rank = int(os.environ.get("LOCAL_RANK", "0"))
    os.sched_setaffinity(0, {cores[rank % len(cores)]})
    torch.set_num_threads(1)
    elapsed = []
    with joined("cpu") as processes:
        step = ours(Operands(CIFAR, batch, torch.device("cpu"), seed), "ft", processes)
        for _ in range(WARMUPS):
            step.run()
        end = time.perf_counter() + seconds
        go_on = True
        while go_on:
            processes.wait()
            start = time.perf_counter()
            for _ in range(STEPS):
                step.run()
            elapsed.append((time.perf_counter() - start) / STEPS * 1e3)
            go_on = processes.on_first(lambda: time.perf_counter() < end)
        if processes.is_first:
            print(json.dumps(elapsed))


if __name__ == "__main__":
    main(int(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3]))
