"""How the Triton kernels are launched: past what Triton finds out anew at every launch of a kernel that it has."""

import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor
from triton import JITFunction, knobs

from .device import current_stream
from .layout import Place

# The interpreter's tl.dot is wrong for 16-bit operands; kernels convert them to float32 where this is set.
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET", "0") == "1")

# What a launch needs of a compiled kernel; a Triton that has it otherwise is asked the ordinary way.
_PARTS = ("run", "function", "packed_metadata")
# AMD's compiler also asks how much memory is behind a pointer.
_KNOWN_BY_ITS_ARGUMENTS = torch.version.hip is None
_MOST_COMPILED = 4096
_NO_HOOKS = (None, None, None)
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
    if found is None or _is_watched() or addresses % ALIGNMENT:
        compiled = kernel[(programs,)](*pointers, *numbers, **constants)
        if addresses % ALIGNMENT == 0 and type(kernel) is JITFunction and _is_as_expected(kernel, compiled):
            if len(_compiled) >= _MOST_COMPILED:
                _compiled.clear()
            arguments = kernel.arg_names[len(pointers) + len(numbers) :]
            _compiled[key] = _Handle(kernel, compiled, tuple(constants[name] for name in arguments))
        return
    _, compiled, values = found
    parts = (current_stream(device), compiled.function, compiled.packed_metadata, *_NO_HOOKS)
    compiled.run(programs, 1, 1, *parts, *pointers, *numbers, *values)


class PlannedLaunch:
    """Launches of one kernel that differ in addresses alone, and in numbers that it is not compiled for.

    Args:
        kernel, programs, constants: as :func:`launch` takes them.
        places: of the kernel's pointers among the tensors that a call gives; what is there has the same dtype in all
            calls, on one device.
    """

    def __init__(self, kernel: Any, programs: int, places: Sequence[Place], constants: dict[str, Any]) -> None:
        self._kernel, self._programs, self._places, self._constants = kernel, programs, tuple(places), constants
        self._offsets = [(tensor, 0 if piece is None else piece.offset) for tensor, piece in places]
        self._compiled: tuple[Any, tuple[Any, ...], tuple[Any, ...]] | None = None

    def __call__(self, tensors: tuple[Tensor, ...], numbers: tuple[Any, ...], stream: int) -> None:
        """Launch on the current device, that of the tensors, and its current stream, which is ``stream``."""
        bases = [tensor.data_ptr() for tensor in tensors]
        bits = 0
        for base in bases:
            bits |= base
        found = self._compiled
        if found is None or _is_watched() or bits % ALIGNMENT:
            self._launch(tensors, numbers, is_aligned=bits % ALIGNMENT == 0)
            return
        run, parts, values = found
        addresses = [bases[tensor] + offset for tensor, offset in self._offsets]
        run(self._programs, 1, 1, stream, *parts, *addresses, *numbers, *values)

    def _launch(self, tensors: tuple[Tensor, ...], numbers: tuple[Any, ...], *, is_aligned: bool) -> None:
        """Through Triton, which finds or compiles the kernel; from the next call on it is known."""
        kernel, constants = self._kernel, self._constants
        pointers = [place.of(tensors) for place in self._places]
        compiled = kernel[(self._programs,)](*pointers, *numbers, **constants)
        if is_aligned and type(kernel) is JITFunction and _is_as_expected(kernel, compiled):
            names = kernel.arg_names[len(pointers) + len(numbers) :]
            parts = (compiled.function, compiled.packed_metadata, *_NO_HOOKS)
            self._compiled = compiled.run, parts, tuple(constants[name] for name in names)


def _is_watched() -> bool:
    """Whether a profiler wants to be told of launches."""
    return bool(knobs.runtime.launch_enter_hook.calls or knobs.runtime.launch_exit_hook.calls)


def _is_as_expected(kernel: Any, compiled: Any) -> bool:
    hooks = (getattr(knobs.runtime, name, None) for name in ("launch_enter_hook", "launch_exit_hook"))
    chained = all(hasattr(hook, "calls") for hook in hooks)
    return (
        _KNOWN_BY_ITS_ARGUMENTS and chained and not kernel.pre_run_hooks and all(hasattr(compiled, it) for it in _PARTS)
    )
