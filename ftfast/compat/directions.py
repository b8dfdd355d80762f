"""Normalised factors on their own, for the peers' names that return them."""

import torch
import torch.nn.functional as F
from torch import Tensor

EPS = 1e-12


def is_overridden(instance: object, home: type, *methods: str) -> bool:
    """Whether a subclass of a peer's class, or the instance, has methods of its own in the place of ``home``'s."""
    return any(getattr(getattr(instance, name), "__func__", None) is not getattr(home, name) for name in methods)


def direction(factor: Tensor) -> Tensor:
    """``[N, ...]`` to unit vectors ``[N, D]``, of any strides.

    float64 stays float64, all else gives float32, since 1e-12 is 0 in float16 and squares overflow there. A zero sample
    gives zeros.

    Raises:
        TypeError: no floating-point tensor.
        ValueError: no samples' dimension and one more.
    """
    if not isinstance(factor, Tensor) or not factor.is_floating_point():
        kind = f"a tensor of {factor.dtype}" if isinstance(factor, Tensor) else f"a {type(factor).__name__}"
        raise TypeError(f"factor is {kind}; it takes a floating-point tensor [N, ...].")
    if factor.dim() < 2:
        raise ValueError(f"factor has shape {tuple(factor.shape)}; it takes [N, ...] of at least 2 dimensions.")
    wide = factor.double() if factor.dtype == torch.float64 else factor.float()
    with torch.autocast(factor.device.type, enabled=False):
        return F.normalize(wide.flatten(1), dim=1, eps=EPS)
