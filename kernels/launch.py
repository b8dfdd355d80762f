"""How the Triton kernels are launched: past what Triton finds out anew at every launch of a kernel that it has."""

import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor
from triton import JITFunction, knobs

from .device import current_stream

# The interpreter's tl.dot is wrong for 16-bit operands; kernels convert them to float32 where this is set.
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET", "0") == "1")

# What a launch needs of a compiled kernel; a Triton that has it otherwise is asked the ordinary way.
_PARTS = ("run", "function", "packed_metadata")
# AMD's compiler also asks how much memory is behind a pointer.
_KNOWN_BY_ITS_ARGUMENTS = torch.version.hip is None
_MOST_COMPILED = 4096
ALIGNMENT = 16  # bytes, from which on Triton compiles for an aligned pointer


class _Handle(NamedTuple):
    kernel: Any  # held, since its id is part of the key
    compiled: Any
    constants: tuple[Any, ...]


_compiled: dict[tuple[Any, ...], _Handle] = {}


def ceil_div(number: int, by: int) -> int:
    """The quotient rounded up; Triton's own takes the host ten times as long."""
    return -(-number // by)


def power_of_2(number: int) -> int:
    """The power of two from ``number`` on; Triton's own takes the host ten times as long."""
    return 1 << (number - 1).bit_length()


def launch(
    kernel: Any, programs: int, pointers: Sequence[Tensor], numbers: Sequence[Any], constants: dict[str, Any]
) -> None:
    """``kernel[(programs,)](*pointers, *numbers, **constants)`` on the current device, in half of its host time.

    Triton compiles for the dtypes and alignments of pointers, for some values of integers and for the constants. Equal
    ones launch the same compiled kernel at once, from the second time on.

    Args:
        pointers: the kernel's first parameters.
        numbers: the next ones; tuples of integers too.
        constants: the kernel's constants and Triton's options, at every launch of a kernel in the same order.
    """
    addresses = 0
    for pointer in pointers:
        addresses |= pointer.data_ptr()
    device = pointers[0].device
    kinds = [float if type(number) is float else number for number in numbers]  # whatever float it is
    key = (id(kernel), device, *[pointer.dtype for pointer in pointers], *kinds, *constants.values())
    found = _compiled.get(key)
    hooks = knobs.runtime.launch_enter_hook.calls or knobs.runtime.launch_exit_hook.calls  # a profiler's
    if found is None or hooks or addresses % ALIGNMENT:
        compiled = kernel[(programs,)](*pointers, *numbers, **constants)
        if addresses % ALIGNMENT == 0 and type(kernel) is JITFunction and _is_as_expected(kernel, compiled):
            if len(_compiled) >= _MOST_COMPILED:
                _compiled.clear()
            arguments = kernel.arg_names[len(pointers) + len(numbers) :]
            _compiled[key] = _Handle(kernel, compiled, tuple(constants[name] for name in arguments))
        return
    _, compiled, values = found
    without_hooks = (None, None, None)
    parts = (current_stream(device), compiled.function, compiled.packed_metadata, *without_hooks)
    compiled.run(programs, 1, 1, *parts, *pointers, *numbers, *values)


def _is_as_expected(kernel: Any, compiled: Any) -> bool:
    hooks = (getattr(knobs.runtime, name, None) for name in ("launch_enter_hook", "launch_exit_hook"))
    chained = all(hasattr(hook, "calls") for hook in hooks)
    return (
        _KNOWN_BY_ITS_ARGUMENTS and chained and not kernel.pre_run_hooks and all(hasattr(compiled, it) for it in _PARTS)
    )
