"""The numbers that every launch of the loss takes, whoever compiles the kernels. Nothing of Triton is imported here."""

import torch
from torch import Tensor


def norm_floor(eps: float, dtype: torch.dtype) -> float:
    """``eps`` as a kernel takes it: the reciprocal of a subnormal number would be infinite."""
    return max(float(eps), torch.finfo(dtype).tiny) if eps else 0.0


def reduction_scale(samples: int, size: int, p: int, reduction: str) -> float:
    """1 over what the sum of l is divided by."""
    if reduction in ("none", "sum"):
        return 1.0
    return 1.0 / (samples * size if reduction == "mean" and p == 1 else samples)


def split_weight(weight: float | Tensor, device: torch.device) -> tuple[float, Tensor | None]:
    """The weight as a number to multiply the scale with, or as a tensor that the kernel reads."""
    if not isinstance(weight, Tensor):
        return weight, None
    if weight.device == device:
        return 1.0, weight
    return weight.item(), None
