"""What launches need from their device: a guard, what it can compile, counters for the program that arrives last."""

import contextlib
import os
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

# The interpreter's tl.dot is wrong for 16-bit operands; kernels convert them to float32 where this is set.
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET", "0") == "1")


def device_guard(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Makes ``device`` the current one, which is where Triton launches."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


@cache
def capability(device: torch.device) -> int:
    """The compute capability times ten that kernels are shaped for: 90 or 100, and 80 for every other device.

    The CPU, for Triton's interpreter, counts as 90.
    """
    if device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major if (major, minor) in ((9, 0), (10, 0)) else 80


_counters: dict[tuple[torch.device, int, int], Tensor] = {}


def arrival_counters(device: torch.device, count: int = 1) -> Tensor:
    """``count`` zeros that the last programs of a launch set back to zero, one buffer for each device and stream.

    A launch under graph capture gets one of its own, zeroed by a node of the graph: graphs captured on one stream may
    be replayed side by side.
    """
    if device.type != "cuda":
        key = (device, 0, count)
    elif torch.cuda.is_current_stream_capturing():
        return torch.zeros(count, dtype=torch.int32, device=device)
    else:
        key = (device, torch.cuda.current_stream(device).cuda_stream, count)
    counters = _counters.get(key)
    if counters is None:
        # Memory pools are routed by thread: from a thread of its own the buffer is out of the pool of a graph that
        # torch.compile is warming up for, and outlives it.
        with ThreadPoolExecutor(max_workers=1) as pool:
            counters = pool.submit(lambda: torch.empty(count, dtype=torch.int32, device=device)).result()
        _counters[key] = counters.zero_()
    return counters
