"""Tensors on their way to kernels that read memory: what lies there has to be what torch would compute with."""

from typing import Any

import torch
from torch import Tensor


def lies_in_memory(tensor: Tensor) -> bool:
    """Whether a tensor's memory holds its numbers: not their negatives, as behind ``z.conj().imag``, nor nothing."""
    return not tensor.is_neg() and bool(tensor.data_ptr() or not tensor.numel())


def plain(tensor: Tensor) -> Tensor:
    """The same tensor, or a copy of it whose memory holds its numbers.

    A copy is made of lazily negated views and of the zeros without memory that autograd may hand on. It is
    differentiable. Real dtypes have no lazily conjugated views.

    Raises:
        RuntimeError: a tensor whose memory was freed.
    """
    if lies_in_memory(tensor):
        return tensor
    if tensor.is_neg() or tensor._is_zerotensor():
        return tensor.clone()
    raise RuntimeError(
        f"a tensor of shape {tuple(tensor.shape)} has no memory behind it, as after its storage was resized to 0; "
        "gather or make it again first."
    )


def save(ctx: Any, *tensors: Tensor | None) -> None:
    """``ctx.save_for_backward``; :func:`saved` gives them back."""
    ctx.save_for_backward(*tensors)
    ctx.saved_strides = tuple(None if tensor is None else tensor.stride() for tensor in tensors)


def saved(ctx: Any, last: int = 0) -> list[Any]:
    """What :func:`save` saved, each in the order of memory that it had; the ``last`` ones alone, where not 0.

    Hooks on saved tensors, as ``torch.autograd.graph.save_on_cpu`` sets them, may hand back another order.
    """
    pairs = zip(ctx.saved_tensors[-last:], ctx.saved_strides[-last:], strict=True)
    return [None if tensor is None else _laid_out(plain(tensor), strides) for tensor, strides in pairs]


def _laid_out(tensor: Tensor, strides: tuple[int, ...]) -> Tensor:
    if tensor.stride() == strides or 0 in strides:  # 0 of an expanded argument, of which no copy can be written
        return tensor
    return torch.empty_strided(tensor.shape, strides, dtype=tensor.dtype, device=tensor.device).copy_(tensor)
