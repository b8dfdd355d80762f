"""Tensors on their way to kernels that read memory: what lies there has to be what torch would compute with."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor


def lies_in_memory(tensor: Tensor) -> bool:
    """Whether a tensor's memory holds its numbers: not their negatives, as behind ``z.conj().imag``, nor nothing."""
    return not tensor.is_neg() and bool(tensor.data_ptr() or not tensor.numel())


def all_lie_in_memory(tensors: Iterable[Tensor]) -> bool:
    """Whether :func:`lies_in_memory` holds for tensors with elements."""
    tensors = tuple(tensors)
    return all(map(Tensor.data_ptr, tensors)) and not any(map(Tensor.is_neg, tensors))


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


def is_batched(gradient: Tensor) -> bool:
    """Whether a gradient stands for several, as vmap's do and those of ``is_grads_batched``."""
    functorch = torch._C._functorch
    return bool(functorch.is_batchedtensor(gradient) or functorch.is_legacy_batchedtensor(gradient))


Layout = tuple[torch.dtype, tuple[int, ...], tuple[int, ...]]


def layout_of(tensor: Tensor) -> Layout:
    """A tensor's dtype, shape and order of memory."""
    return tensor.dtype, tensor.shape, tensor.stride()


def save(ctx: Any, *tensors: Tensor | None) -> None:
    """``ctx.save_for_backward``; :func:`saved` gives them back."""
    ctx.save_for_backward(*tensors)
    ctx.saved_layouts = [None if tensor is None else layout_of(tensor) for tensor in tensors]


def saved(ctx: Any) -> tuple[Any, ...]:
    """What :func:`save` saved, each in the dtype and order of memory that it had.

    Hooks on saved tensors, as ``torch.autograd.graph.save_on_cpu`` sets them, may hand back others.
    """
    return as_saved(ctx.saved_tensors, ctx.saved_layouts)


def as_saved(tensors: Sequence[Tensor | None], layouts: Sequence[Layout | None]) -> tuple[Any, ...]:
    """Saved tensors, each in the layout that it had; None as it is.

    Raises:
        RuntimeError: a tensor that has another size now, which torch's version counters do not tell.
    """
    for tensor, layout in zip(tensors, layouts, strict=True):
        if tensor is not None and (layout_of(tensor) != layout or not lies_in_memory(tensor)):
            break
    else:
        return tuple(tensors)
    pairs = zip(tensors, layouts, strict=True)
    return tuple(
        tensor if tensor is None or layout is None else _laid_out(plain(tensor), *layout) for tensor, layout in pairs
    )


def _laid_out(tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...], strides: tuple[int, ...]) -> Tensor:
    if layout_of(tensor) == (dtype, shape, strides):
        return tensor
    if tensor.shape != shape:
        raise RuntimeError(
            f"a tensor of shape {tuple(shape)} that forward kept has shape {tuple(tensor.shape)} in backward; leave "
            "its .data as it is until then."
        )
    # Of an expanded argument one copy is written.
    once = tensor[tuple(slice(1) if step == 0 else slice(None) for step in strides)]
    return torch.empty_strided(once.shape, strides, dtype=dtype, device=tensor.device).copy_(once).expand(tensor.shape)
