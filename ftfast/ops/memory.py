"""Tensors on their way to kernels that read memory: what lies there has to be what torch would compute with."""

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
