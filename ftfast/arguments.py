"""What the loss takes, in one place: everything else is refused in a sentence before anything runs."""

import torch
from torch import Tensor

FACTOR_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# A stored teacher factor may be one of these: the loss sees only a factor's direction, so they need no scale.
QUANTISED_DTYPES = (torch.int8, torch.float8_e4m3fn)
REDUCTIONS = ("mean", "batchmean", "sum", "none")
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
    if not isinstance(eps, (int, float)) or not eps >= 0:
        raise ValueError(f"eps is {eps!r}; it takes a number of at least 0, 1e-12 by default.")
    if isinstance(weight, Tensor):
        if weight.dim() != 0 or weight.is_complex():
            kind = f"{weight.dtype} of shape {tuple(weight.shape)}"
            raise ValueError(f"weight is {kind}; it takes a float or a real 0-d tensor.")
    elif not isinstance(weight, (int, float)):
        raise TypeError(f"weight is a {type(weight).__name__}; it takes a float or a 0-d tensor.")


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
    if teacher_factor.dtype not in FACTOR_DTYPES + QUANTISED_DTYPES:
        raise TypeError(
            f"teacher_factor has dtype {teacher_factor.dtype}; it takes float64, float32, bfloat16, float16, int8 or "
            "float8_e4m3fn."
        )
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
