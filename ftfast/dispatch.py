"""Which backend computes, and why each other one does not.

A backend is asked ``supports(...) -> Support``; an explicit choice that cannot run raises with the reason, "auto"
takes the first of its device's list that can and says so once where that is not the fastest one.
"""

import importlib
import importlib.util
import json
import logging
import os
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import NamedTuple, get_args

import torch
from torch import Tensor

from ftfast.arguments import FACTOR_DTYPES, QUANTISED_DTYPES, Backend, check_factors

CHOICES: tuple[str, ...] = get_args(Backend)
BACKENDS = CHOICES[1:]  # all but "auto"
BUILD_REPORT = Path(__file__).with_name("_build_report.json")

# Fastest first; the reference runs everywhere and closes every list.
_PREFERENCE = {"cpu": ("native", "reference"), "cuda": ("triton", "reference")}

_log = logging.getLogger("ftfast")
_said: set[str] = set()


class Support(NamedTuple):
    """Whether a backend can run here, and the reason in words, which is shown to users."""

    ok: bool
    reason: str


@cache
def load_extension() -> tuple[ModuleType | None, str]:
    """The compiled extension and how it came to be here, or None and why it is not."""
    try:
        return importlib.import_module("ftfast._C"), "compiled extension ftfast._C"
    except ImportError as error:
        if BUILD_REPORT.is_file():
            reason = str(json.loads(BUILD_REPORT.read_text()).get("reason", ""))
            if reason:
                return None, reason
        if "_C" not in str(error) or isinstance(error, ModuleNotFoundError):
            return None, "the extension ftfast._C has not been built; run 'pip install -e .' in the checkout"
        return None, f"the extension ftfast._C does not load: {error}"


@cache
def extension() -> ModuleType:
    """The compiled extension, where it is known to be here."""
    found, _ = load_extension()
    assert found is not None
    return found


@cache
def interpreting() -> bool:
    """Whether Triton runs its kernels in its interpreter, on the CPU."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def supports(backend: str, device: torch.device, student_dtype: torch.dtype, teacher_dtype: torch.dtype) -> Support:
    """Whether ``backend`` computes factors of these dtypes on this device."""
    if student_dtype not in FACTOR_DTYPES or teacher_dtype not in FACTOR_DTYPES + QUANTISED_DTYPES:
        return Support(False, f"there is no loss of {student_dtype} against {teacher_dtype}")
    if backend == "reference":
        return Support(True, "plain PyTorch, on any device")
    if backend == "native":
        return _native_supports(device)
    return _triton_supports(device, teacher_dtype)


def _native_supports(device: torch.device) -> Support:
    if device.type not in ("cpu", "cuda"):
        return Support(False, f"its kernels are for CPUs and CUDA devices, and these tensors are on {device.type}")
    extension, reason = load_extension()
    if extension is None:
        return Support(False, reason)
    if device.type == "cuda":
        return _cuda_supports(extension, device)
    return Support(True, f"C++ kernels, {extension.instruction_set()} instructions, {torch.get_num_threads()} threads")


def _cuda_supports(extension: ModuleType, device: torch.device) -> Support:
    if not hasattr(extension, "ft_loss_cuda_forward"):
        return Support(False, "the extension was built without nvcc, so it has no kernels for GPUs")
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        return Support(False, f"its CUDA kernels need compute capability 8.0, and this device has {capability}")
    if importlib.util.find_spec("triton") is None:
        return Support(False, "its counters are those of the Triton launches, and the package triton is not installed")
    if problem := _cuda_problem(torch.cuda.current_device() if device.index is None else device.index):
        return Support(False, f"its CUDA kernels do not run on this device: {problem}")
    return Support(True, "CUDA C++ kernels")


@cache
def _cuda_problem(index: int) -> str:
    with torch.cuda.device(index):
        return str(extension().ft_loss_cuda_problem(index))


def _triton_supports(device: torch.device, teacher_dtype: torch.dtype) -> Support:
    if importlib.util.find_spec("triton") is None:
        return Support(False, "the package triton is not installed")
    if device.type == "cpu":
        if interpreting():
            return Support(True, "Triton's interpreter (TRITON_INTERPRET=1), for tests: slow")
        return Support(False, "Triton compiles for GPUs, and these tensors are on the CPU")
    if device.type != "cuda":
        return Support(False, f"its kernels are written for CUDA devices, and these tensors are on {device.type}")
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        return Support(False, f"its kernels need compute capability 8.0, and this device has {capability}")
    if teacher_dtype == torch.float8_e4m3fn and capability < (8, 9):
        return Support(False, f"float8_e4m3fn needs compute capability 8.9, and this device has {capability}")
    return Support(True, "Triton kernels")


def resolve(backend: str) -> str:
    """The requested backend: the argument, or FTFAST_BACKEND where the argument is "auto"."""
    if backend == "auto":
        backend = os.environ.get("FTFAST_BACKEND", "auto") or "auto"
    if backend not in CHOICES:
        raise ValueError(f"backend is {backend!r}; it takes one of {', '.join(CHOICES)}.")
    return backend


def choose(backend: str, student_factor: Tensor, teacher_factor: Tensor) -> str:
    """The backend that computes these factors.

    Raises:
        ValueError: an unknown backend.
        RuntimeError: an explicit backend that cannot run here, with the reason.
    """
    return _choose(resolve(backend), student_factor.device, student_factor.dtype, teacher_factor.dtype)


def _choose(requested: str, device: torch.device, student: torch.dtype, teacher: torch.dtype) -> str:
    if requested != "auto":
        support = supports(requested, device, student, teacher)
        if not support.ok:
            raise RuntimeError(f'backend "{requested}" cannot run: {support.reason}; use backend="auto".')
        return requested
    candidates = _PREFERENCE.get(device.type, ("reference",))
    for backend in candidates:
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
    candidates = _PREFERENCE.get(device.type, ("reference",))
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
