"""What every launch needs from its device: a guard, and a counter for the program that arrives last."""

import contextlib
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor


def device_guard(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Makes ``device`` the current one, which is where Triton launches."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


_counters: dict[tuple[torch.device, int], Tensor] = {}


def arrival_counter(device: torch.device) -> Tensor:
    """A zero that the last program of a launch sets back to zero, one for each device and stream.

    A launch under graph capture gets one of its own, zeroed by a node of the graph: graphs captured on one stream may
    be replayed side by side.
    """
    if device.type != "cuda":
        key = (device, 0)
    elif torch.cuda.is_current_stream_capturing():
        return torch.zeros(1, dtype=torch.int32, device=device)
    else:
        key = (device, torch.cuda.current_stream(device).cuda_stream)
    counter = _counters.get(key)
    if counter is None:
        # Memory pools are routed by thread: from a thread of its own the counter is out of the pool of a graph that
        # torch.compile is warming up for, and outlives it.
        with ThreadPoolExecutor(max_workers=1) as pool:
            counter = pool.submit(lambda: torch.empty(1, dtype=torch.int32, device=device)).result()
        _counters[key] = counter.zero_()
    return counter
