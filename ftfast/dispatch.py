"""Which backend computes, and why each other one does not.

A backend is asked ``supports(...) -> Support``; an explicit choice that cannot run raises with the reason, "auto"
takes the first on this device that can and says so once where that is not the fastest one.
"""

import logging
import os
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ftfast.arguments import FACTOR_DTYPES, QUANTISED_DTYPES, check_factors
from ftfast.backends import Backend, KernelBackend, Support
from ftfast.backends.native import Native
from ftfast.backends.reference import Reference
from ftfast.backends.triton import Triton

# Where two are automatic on one device, the faster stands first; the reference closes every list.
BACKENDS: dict[str, Backend] = {
    backend.name: backend
    for backend in (
        Reference(),
        Native(),
        Triton(),
    )
}

_log = logging.getLogger("ftfast")
_said: set[str] = set()


def supports(backend: str, device: torch.device, student_dtype: torch.dtype, teacher_dtype: torch.dtype) -> Support:
    """Whether ``backend`` computes factors of these dtypes on this device."""
    if student_dtype not in FACTOR_DTYPES or teacher_dtype not in FACTOR_DTYPES + QUANTISED_DTYPES:
        return Support(False, f"there is no loss of {student_dtype} against {teacher_dtype}")
    return BACKENDS[backend].supports(device, student_dtype, teacher_dtype)


def _automatic(device: torch.device) -> list[str]:
    return [*(name for name, backend in BACKENDS.items() if device.type in backend.automatic_on), "reference"]


def resolve(backend: str) -> str:
    """The requested backend: the argument, or FTFAST_BACKEND where the argument is "auto"."""
    if backend == "auto":
        backend = os.environ.get("FTFAST_BACKEND", "auto") or "auto"
    if backend != "auto" and backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}; it takes one of auto, {', '.join(BACKENDS)}.")
    return backend


def choose(backend: str, student_factor: Tensor, teacher_factor: Tensor) -> str:
    """The backend that computes these factors.

    Raises:
        ValueError: an unknown backend.
        RuntimeError: an explicit backend that cannot run here, with the reason.
    """
    return _choose(resolve(backend), student_factor.device, student_factor.dtype, teacher_factor.dtype)


def chosen_with(
    kernels: Callable[[KernelBackend], Any], backend: str, student_factor: Tensor, teacher_factor: Tensor
) -> str:
    """The backend that has kernels of another kind for tensors such as these; "" where none has.

    Under "auto" the first one, which need not be the one that computes their loss.

    Args:
        kernels: what a backend has; None for nothing.
    """
    requested, device = resolve(backend), student_factor.device
    for name in _automatic(device) if requested == "auto" else [requested]:
        found = BACKENDS[name]
        has = isinstance(found, KernelBackend) and kernels(found) is not None
        if has and supports(name, device, student_factor.dtype, teacher_factor.dtype).ok:
            return name
    return ""


def kernels_for(
    operation: str, device: torch.device, dtype: torch.dtype, backend: str = "auto", *, unasked: bool = False
) -> ModuleType | None:
    """The module that computes an operation of :attr:`KernelBackend.modules`; None where no backend does.

    Under "auto" that of the first backend on this device that has one.

    Args:
        unasked: under "auto" also of those that run only when asked for, after the others.
    """
    requested = resolve(backend)
    names = [*_automatic(device), *(BACKENDS if unasked else ())] if requested == "auto" else [requested]
    for name in names:
        found = BACKENDS[name]
        if not isinstance(found, KernelBackend) or operation not in found.modules:
            continue
        if supports(name, device, dtype, dtype).ok and (kernels := found.kernels(operation, device)) is not None:
            return kernels
    return None


def _choose(requested: str, device: torch.device, student: torch.dtype, teacher: torch.dtype) -> str:
    if requested != "auto":
        support = supports(requested, device, student, teacher)
        if not support.ok:
            raise RuntimeError(f'backend "{requested}" cannot run: {support.reason}; use backend="auto".')
        return requested
    for backend in _automatic(device):
        support = supports(backend, device, student, teacher)
        if support.ok:
            return backend
        message = f"ftfast falls back from its {backend} backend: {support.reason}."
        if message not in _said:
            _said.add(message)
            _log.warning(message)
    raise AssertionError("the reference backend closes every list")


# What torch.compiler.assume_constant_result sets, without its import of the whole compiler: under torch.compile the
# choice is made once while tracing, and not traced itself.
_choose._dynamo_marked_constant = True  # type: ignore[attr-defined]


def explain(student_factor: Tensor, teacher_factor: Tensor) -> str:
    """Which backend ``ft_loss(student_factor, teacher_factor)`` runs on, and why each other one does not.

    Returns:
        One line for each backend; the one that runs, or was asked for, comes first.

    Raises:
        TypeError, ValueError: factors that the loss refuses, or an unknown FTFAST_BACKEND.
    """
    check_factors(student_factor, teacher_factor)
    device, dtypes = student_factor.device, (student_factor.dtype, teacher_factor.dtype)
    requested = resolve("auto")
    source = "" if requested == "auto" else " (set by FTFAST_BACKEND)"
    if requested != "auto" and not (support := supports(requested, device, *dtypes)).ok:
        lines = [f"{requested} was asked for{source} and cannot run: {support.reason}"]
        chosen = requested
    else:
        chosen = choose("auto", student_factor, teacher_factor)
        lines = [f"{chosen} runs{source}: {supports(chosen, device, *dtypes).reason}"]
    candidates = _automatic(device)
    for backend in BACKENDS:
        if backend == chosen:
            continue
        support = supports(backend, device, *dtypes)
        if not support.ok:
            reason = support.reason
        elif backend in candidates and requested == "auto":
            reason = f"{chosen} is faster here"
        else:
            reason = f"it could ({support.reason}), and runs only when asked for"
        lines.append(f"{backend} does not run: {reason}")
    return "\n".join(lines)
