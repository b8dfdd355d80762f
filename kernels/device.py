"""What launches need from their device, whoever compiles the kernels: a guard, the stream, counters for the program
that arrives last, and what the device can compile. Nothing of Triton is imported here.
"""

import contextlib
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import torch
from torch import Tensor

_NO_GUARD = contextlib.nullcontext()


def is_current(device: torch.device) -> bool:
    """Whether kernels are launched on ``device``, that of a tensor, as things stand; always so on a CPU."""
    return device.type != "cuda" or torch._C._cuda_getDevice() == device.index


def device_guard(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Makes ``device``, that of a tensor, the current one, which is where kernels are launched."""
    return _NO_GUARD if is_current(device) else torch.cuda.device(device)


def current_stream(device: torch.device) -> int:
    """The address of the current stream of a tensor's device; 0 on a CPU.

    ``torch.cuda.current_stream`` makes an object for it, which costs more than a small kernel's launch.
    """
    return torch._C._cuda_getCurrentRawStream(device.index) if device.type == "cuda" else 0


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
    if device.type == "cuda" and torch._C._cuda_isCurrentStreamCapturing():
        return torch.zeros(count, dtype=torch.int32, device=device)
    key = (device, current_stream(device), count)
    counters = _counters.get(key)
    if counters is None:
        # Memory pools are routed by thread: from a thread of its own the buffer is out of the pool of a graph that
        # torch.compile is warming up for, and outlives it.
        with ThreadPoolExecutor(max_workers=1) as pool:
            counters = pool.submit(lambda: torch.empty(count, dtype=torch.int32, device=device)).result()
        _counters[key] = counters.zero_()
    return counters
