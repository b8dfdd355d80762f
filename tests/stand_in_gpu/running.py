"""Running on the stand-in GPU, and reading from it what a piece of work gave to the device."""

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path

import torch
from torch import Tensor

from tests.stand_in_gpu.build import RUNTIME, libraries

ROOT = Path(__file__).parents[2]


def environment() -> dict[str, str]:
    """Of a process that has a stand-in GPU.

    Raises:
        CannotBuildError: it cannot be built here.
    """
    folder = libraries()
    given = {name: os.environ[name].split(":") for name in ("PYTHONPATH", "LD_LIBRARY_PATH") if os.environ.get(name)}
    return {
        **os.environ,
        "LD_PRELOAD": str(folder / RUNTIME),
        "LD_LIBRARY_PATH": ":".join([str(folder), *given.get("LD_LIBRARY_PATH", [])]),
        "PYTHONPATH": ":".join([str(ROOT), str(folder), *given.get("PYTHONPATH", [])]),
        "TRITON_LIBCUDA_PATH": str(folder),
        # What Triton links against the stand-in is of no use beside a GPU.
        "TRITON_CACHE_DIR": str(folder / "triton"),
        "TRITON_INTERPRET": "0",
    }


@dataclass
class Counts:
    """What was given to the devices, and asked of them.

    Attributes:
        launches: kernels and fills that ran, each a call into CUDA.
        copies: of memory, that ran.
        replays: of graphs.
        captured: what became a node of a graph, whatever it was.
        synchronisations: waits of the host.
        allocations: of memory, which wait for the device too.
        legacy: of all that ran, what the default stream got.
        uncaptured: of all that ran, what did while a stream was being captured.
        pageable: copies from or to memory that is not page-locked, which wait.
        refused: calls that a GPU refuses: on a stream of another device, or forbidden by a capture.
        kernels, captured_kernels: sums that are equal where the same kernels with the same numbers of blocks were
            launched, or captured.
        own: of all, captured or not, what the stream got that was current at the start.
    """

    launches: int = 0
    copies: int = 0
    replays: int = 0
    captured: int = 0
    synchronisations: int = 0
    allocations: int = 0
    legacy: int = 0
    uncaptured: int = 0
    pageable: int = 0
    refused: int = 0
    kernels: int = field(default=0, compare=False)
    captured_kernels: int = field(default=0, compare=False)
    own: int = 0


def contents(tensor: Tensor) -> bytes:
    """What copies from the host have left in a contiguous tensor's memory on the device."""
    return ctypes.string_at(tensor.data_ptr(), tensor.nbytes)


class _Totals(ctypes.Structure):
    _fields_ = [(it.name, ctypes.c_ulong) for it in fields(Counts)[:-1]]


@contextmanager
def counted(device: int = 0) -> Iterator[Counts]:
    """Counts of what is done within, filled in at its end; ``own`` on a stream of one's own alone.

    Args:
        device: whose current stream that is.
    """
    totals = _Totals.in_dll(ctypes.CDLL(None), "stand_in_counts")
    stream = torch.cuda.current_stream(device).cuda_stream
    own = ctypes.c_ulong.from_address(stream) if stream else ctypes.c_ulong()
    names = [it.name for it in fields(Counts)[:-1]]
    before, own_before = [getattr(totals, name) for name in names], own.value
    found = Counts()
    yield found
    for name, then in zip(names, before, strict=True):
        setattr(found, name, (getattr(totals, name) - then) % 2**64)
    found.own = own.value - own_before
