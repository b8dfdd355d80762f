"""What the loss takes, in one place: everything else is refused in a sentence before anything runs."""

from numbers import Real
from typing import Literal, get_args

import torch
from torch import Tensor

FACTOR_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# A stored teacher factor may be one of these: the loss sees only a factor's direction, so they need no scale.
QUANTISED_DTYPES = (torch.int8, torch.float8_e4m3fn)
Reduction = Literal["mean", "batchmean", "sum", "none"]
"""What :func:`ftfast.ft_loss` takes as ``reduction``."""
Backend = Literal["auto", "reference", "native", "triton"]
"""What :func:`ftfast.ft_loss` takes as ``backend``."""
REDUCTIONS: tuple[str, ...] = get_args(Reduction)
MAX_DIMS = 9


def check_options(*, p: int, reduction: str, eps: float, weight: float | Tensor) -> None:
    """Raises ValueError or TypeError on an option that no backend takes."""
    if isinstance(p, bool) or not isinstance(p, int) or p not in (1, 2):
        raise ValueError(f"p is {p!r}; it takes 1 (the official code) or 2.")
    if reduction not in REDUCTIONS:
        raise ValueError(
            f'reduction is {reduction!r}; it takes "mean" (divides by N*D for p=1 and by N for p=2), "batchmean" '
            '(divides by N), "sum" or "none".'
        )
    if _is_beyond_float(eps):
        raise ValueError("eps is beyond the range of a float; it takes a number of at least 0, 1e-12 by default.")
    if not isinstance(eps, Real) or not eps >= 0:
        raise ValueError(f"eps is {eps!r}; it takes a number of at least 0, 1e-12 by default.")
    if isinstance(weight, Tensor):
        if weight.dim() != 0 or weight.is_complex():
            kind = f"{weight.dtype} of shape {tuple(weight.shape)}"
            raise ValueError(f"weight is {kind}; it takes a float or a real 0-d tensor.")
    elif _is_beyond_float(weight):
        raise ValueError("weight is beyond the range of a float; it takes a float or a real 0-d tensor.")
    elif not isinstance(weight, Real):
        raise TypeError(f"weight is a {type(weight).__name__}; it takes a float or a 0-d tensor.")


def _is_beyond_float(number: object) -> bool:
    """Whether it is an integer that no float holds."""
    try:
        return isinstance(number, int) and float(number) != float(number)
    except OverflowError:
        return True


def check_factors(student_factor: Tensor, teacher_factor: Tensor, weight: float | Tensor = 1.0) -> None:
    """Raises ValueError or TypeError on factors that cannot be compared."""
    for name, factor in (("student_factor", student_factor), ("teacher_factor", teacher_factor)):
        if not isinstance(factor, Tensor):
            raise TypeError(f"{name} is a {type(factor).__name__}; it takes a tensor.")
        if type(factor).__name__ == "DTensor":
            raise TypeError(f"{name} is a DTensor; the loss takes local tensors, so pass {name}.to_local().")
        if factor.is_nested:
            raise TypeError(f"{name} is a nested tensor; it takes samples of one shape, so pass {name} padded.")
        if factor.layout != torch.strided:
            raise TypeError(f"{name} has layout {factor.layout}; it takes a dense tensor, so pass {name}.to_dense().")
    if student_factor.dtype not in FACTOR_DTYPES:
        raise TypeError(
            f"student_factor has dtype {student_factor.dtype}; it takes float64, float32, bfloat16 or float16."
        )
    check_teacher_dtype(teacher_factor)
    if student_factor.shape != teacher_factor.shape:
        raise ValueError(
            f"student_factor has shape {tuple(student_factor.shape)} and teacher_factor "
            f"{tuple(teacher_factor.shape)}; both must have the same samples, channels and map size."
        )
    if not 2 <= student_factor.dim() <= MAX_DIMS:
        raise ValueError(
            f"student_factor has shape {tuple(student_factor.shape)}; it takes [N, ...] of 2 to {MAX_DIMS} dimensions."
        )
    if student_factor.device != teacher_factor.device:
        raise ValueError(
            f"student_factor is on {student_factor.device} and teacher_factor on {teacher_factor.device}; "
            "move one of them."
        )
    if isinstance(weight, Tensor) and weight.device.type != "cpu" and weight.device != student_factor.device:
        raise ValueError(
            f"weight is on {weight.device} and the factors on {student_factor.device}; keep it there or on the CPU."
        )


def check_teacher_dtype(teacher_factor: Tensor) -> None:
    """Raises TypeError on a dtype that no teacher's factor may have, or may not have where it is trained."""
    if teacher_factor.dtype not in FACTOR_DTYPES + QUANTISED_DTYPES:
        raise TypeError(
            f"teacher_factor has dtype {teacher_factor.dtype}; it takes float64, float32, bfloat16, float16, int8 or "
            "float8_e4m3fn."
        )
    if teacher_factor.dtype in QUANTISED_DTYPES and teacher_factor.requires_grad:
        raise TypeError(
            f"teacher_factor is {teacher_factor.dtype} and requires a gradient, which that dtype cannot hold; "
            "pass teacher_factor.detach(), or train a copy of it in a wider dtype."
        )


def check_features(
    student_features: Tensor,
    teacher_features: Tensor | None,
    teacher_factor: Tensor | None,
    *,
    student_channels: int,
    teacher_channels: int,
    factor_channels: int,
    parameter: Tensor,
) -> None:
    """Raises ValueError or TypeError on features that a head of these channels cannot compare.

    Args:
        parameter: one of the translator's.
    """
    sides = [("student_features", student_features, "translator", student_channels)]
    if teacher_features is not None:
        sides.append(("teacher_features", teacher_features, "paraphraser", teacher_channels))
    if teacher_factor is not None:
        sides.append(("teacher_factor", teacher_factor, "", factor_channels))
    for name, features, module, channels in sides:
        if not isinstance(features, Tensor):
            raise TypeError(f"{name} is a {type(features).__name__}; it takes a tensor [N, {channels}, H, W].")
        if features.dim() != 4:
            raise ValueError(f"{name} has shape {tuple(features.shape)}; it takes a map [N, {channels}, H, W].")
        if name != "teacher_factor" and not features.is_floating_point():
            raise TypeError(f"{name} has dtype {features.dtype}; it takes floating-point features.")
        if name == "student_features" and features.dtype not in FACTOR_DTYPES:
            raise TypeError(f"{name} has dtype {features.dtype}; it takes float64, float32, bfloat16 or float16.")
        if name == "teacher_factor":
            check_teacher_dtype(features)
        if features.shape[1] != channels:
            remedy = (
                f"build it as {module.capitalize()}({features.shape[1]}, ...)"
                if module
                else "the factor must be of the head's own paraphraser"
            )
            taken = f"the {module} takes {channels}" if module else f"the head compares {channels}"
            raise ValueError(f"{name} has {features.shape[1]} channels and {taken}; {remedy}.")
        if 0 in features.shape[2:]:
            raise ValueError(f"{name} has shape {tuple(features.shape)}, a map without pixels; it takes H, W >= 1.")
        if features.device != student_features.device:
            raise ValueError(
                f"{name} is on {features.device} and student_features on {student_features.device}; move one of them."
            )
        if features.shape[0] != student_features.shape[0]:
            raise ValueError(
                f"{name} has {features.shape[0]} samples and student_features {student_features.shape[0]}; both "
                "sides must see the same batch."
            )
        if features.shape[2:] != student_features.shape[2:]:
            raise ValueError(
                f"{name} has maps of {features.shape[2]}x{features.shape[3]} and student_features of "
                f"{student_features.shape[2]}x{student_features.shape[3]}; tap layers of the same map size, or pool "
                "one side."
            )
    if parameter.device != student_features.device:
        raise ValueError(
            f"student_features are on {student_features.device} and the translator's parameters on "
            f"{parameter.device}; move the head with .to({str(student_features.device)!r})."
        )


def check_parameter(module: str, parameter: Tensor) -> None:
    """Raises TypeError where a module of a head has parameters of a dtype that nothing is computed with."""
    if parameter.dtype not in FACTOR_DTYPES:
        raise TypeError(
            f"the {module}'s parameters are {parameter.dtype}; it takes float64, float32, bfloat16 or float16, so "
            "convert them with .to(torch.float32)."
        )


def check_map_dtype(dtype: torch.dtype, parameter: Tensor) -> None:
    """Raises TypeError where features of this dtype meet parameters of another outside autocast."""
    if parameter.dtype != dtype:
        raise TypeError(
            f"student_features are {dtype} and the translator's parameters {parameter.dtype}; run the head under "
            "torch.autocast or convert one of them."
        )


def has_bfloat16(device_type: str) -> bool:
    """Whether there are instructions for bfloat16; emulated, it is slower than float32."""
    if device_type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return any(value is True for name, value in capabilities.items() if name.endswith("bf16"))
