"""Which kernels compute a head, and why."""

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ftfast.backends import KernelBackend, Options
from ftfast.backends.triton import interpreting
from ftfast.dispatch import BACKENDS, choose, chosen_with, resolve
from ftfast.ops.ft_head.operands import SEPARATE, Plan
from ftfast.ops.ft_head.stack import Stack
from ftfast.ops.ft_loss.function import needs_torch_operators, watched_by
from ftfast.ops.maps import autocasts, map_dtype, rounds_to_tf32
from ftfast.ops.remembered import ORDINARY, Remembered, kind_of_weight

# Plans of heads by kind_of_head.
known_plans: Remembered[tuple[Any, ...], Plan] = Remembered()


def kind_of_head(
    student: Tensor,
    teacher: Tensor | None,
    teacher_factor: Tensor | None,
    translator: Stack | str,
    paraphraser: Stack | str,
    options: Options,
    backend: str,
) -> tuple[Any, ...] | None:
    """What the checks of a head's arguments and its plan depend on beside the modules' own channels; None where that
    is not told by what is quick to read.
    """
    known = teacher if teacher_factor is None else teacher_factor
    assert known is not None
    if type(student) not in ORDINARY or type(known) not in ORDINARY or type(translator) is str:
        return None
    if torch.compiler.is_compiling() or watched_by():
        return None
    p, reduction, eps, weight = options
    if type(p) is not int or type(eps) is not float or type(reduction) is not str:
        return None
    assert isinstance(translator, Stack)
    parameter, last, casts = translator.weights[0], translator.weights[-1], autocasts(student)
    dtype = torch.get_autocast_dtype(student.device.type) if casts else student.dtype
    rounds = dtype == torch.float32 and student.device.type == "cuda" and rounds_to_tf32()
    return (
        *(student.shape, student.dtype, student.device, student.requires_grad),
        *(known.shape, known.dtype, known.device, known.requires_grad),
        *(p, reduction, eps, kind_of_weight(weight), resolve(backend)),
        *(teacher is None, casts, dtype, rounds, parameter.dtype, parameter.device, parameter.shape, last.shape),
        paraphraser if type(paraphraser) is str else "",
    )


def plan_head(
    student: Tensor,
    teacher: Tensor | None,
    teacher_factor: Tensor | None,
    translator: Stack | str,
    paraphraser: Stack | str,
    backend: str,
) -> Plan:
    """Which kernels compute the head of these features.

    Args:
        translator, paraphraser: their convolutions, or the reason why they must run as torch modules.
    """
    dtype = map_dtype(student)
    known = student if teacher_factor is None else teacher_factor
    chosen = choose(backend, student, known)
    reason = "" if chosen != "reference" else 'backend="reference" runs torch\'s modules'
    if isinstance(translator, str):
        reason = reason or translator
    if teacher_factor is None and isinstance(paraphraser, str):
        reason = reason or paraphraser
    if torch.compiler.is_compiling():
        reason = reason or "under torch.compile the convolutions are the compiler's"
    if teacher_factor is not None and teacher_factor.requires_grad:
        reason = reason or "teacher_factor requires a gradient"
    if teacher_factor is not None and teacher_factor.dtype == torch.float64 != dtype:
        reason = reason or f"teacher_factor is float64 and the maps are {dtype}"
    if student.shape[0] == 0:
        reason = reason or "there are no samples"
    reason = reason or needs_torch_operators(student, known)
    if reason:
        return Plan(SEPARATE, chosen, dtype, reason)
    assert isinstance(translator, Stack)
    factor_channels = translator.weights[-1].shape[0]
    teacher_channels = None if teacher is None else teacher.shape[1]
    with_kernels = chosen_with(lambda it: it.head_kernels(student.device), backend, student, known) or chosen
    kind = (with_kernels, student.device, dtype, teacher_channels, rounds_to_tf32())
    return _plan_kernel(kind, tuple(student.shape), factor_channels)


@lru_cache(maxsize=1024)
def _plan_kernel(
    kind: tuple[str, torch.device, torch.dtype, int | None, bool],
    shape: tuple[int, ...],
    factor_channels: int,
) -> Plan:
    backend, device, dtype, teacher_channels, _ = kind
    found = BACKENDS[backend]
    kernels = found.head_kernels(device) if isinstance(found, KernelBackend) else None
    if kernels is None:
        return Plan(SEPARATE, backend, dtype, f"the {backend} backend has no kernels for a head on {device.type}")
    kernel, reason = kernels.choose(device, dtype, shape, factor_channels, teacher_channels)
    return Plan(kernel, backend, dtype, reason)


def describe(plan: Plan, requested: str) -> str:
    """A plan in words."""
    asked = resolve(requested)
    source = "" if asked == "auto" else f' (backend="{asked}")'
    if plan.kernel == SEPARATE:
        return f"the head runs as torch's convolutions and the {plan.backend} loss{source}: {plan.reason}"
    dtype = str(plan.dtype).removeprefix("torch.")
    where = ", in Triton's interpreter" if plan.backend == "triton" and interpreting() else ""
    return f"the head runs fused on the {plan.backend} backend{source}{where}, {plan.kernel}, in {dtype}: {plan.reason}"
