"""What torch draws from, so that the same seed gives the same numbers wherever a training was ended."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Inside, torch draws from ``seed`` on the CPU; outside, its random state is as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


def seed_generators(seed: int, device: torch.device) -> None:
    """Has torch draw from ``seed`` on the CPU and the device; ``torch.manual_seed`` costs 100 us for all devices."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        place = torch.cuda.current_device() if device.index is None else device.index
        torch.cuda.default_generators[place].manual_seed(seed)


def seed_of(*numbers: int) -> int:
    """Of a training's seed, a step, a process: no two lists of numbers share one but by chance."""
    import numpy as np  # not there where ftfast was installed alone, and a frozen teacher needs none

    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])
