"""The arithmetic that every kernel of the factor transfer loss shares, whatever it keeps for backward."""

# mypy: disallow-incomplete-defs=False
# (a kernel's parameters carry Triton's annotations, and only where Triton needs one)

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def square_root(x):
    """Correct for subnormal sums too."""
    # tl.sqrt of float32 flushes subnormal sums to 0.
    if x.dtype == tl.float64:
        return tl.sqrt(x)
    else:
        return tl.sqrt_rn(x)


@triton.jit
def loss_factor(scale, weight, WEIGHTED: tl.constexpr, DTYPE: tl.constexpr):
    """What l is multiplied with: the reduction's scale, and the weight where that is a tensor."""
    factor = tl.full((), scale, DTYPE)
    if WEIGHTED:
        factor *= tl.load(weight).to(DTYPE)
    return factor


@triton.jit
def terms_of(a, b, P: tl.constexpr):
    """What adds up to l (squared for P = 2) and to <g, a> and <g, b>, with g not yet divided by l for P = 2."""
    difference = a - b
    if P == 1:
        sign = (difference > 0).to(a.dtype) - (difference < 0).to(a.dtype)
        return tl.abs(difference), sign * a, sign * b
    else:
        return difference * difference, difference * a, difference * b


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
