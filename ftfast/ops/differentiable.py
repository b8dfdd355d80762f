"""Gradients through torch's own operators, where one is to be differentiated again or stands for several."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def gradients_through_torch(
    function: Callable[..., Tensor], inputs: Sequence[Tensor], needed: Sequence[bool], upstream: Tensor
) -> tuple[Tensor | None, ...]:
    """The gradients of ``function(*inputs)`` that are needed, with a graph of their own where grad mode is on.

    They are taken at aliases of the inputs: taken at the caller's own tensors they would run those tensors' hooks,
    which run again when the gradients arrive there.
    """
    is_differentiated_again = torch.is_grad_enabled()
    with torch.enable_grad():
        aliases = [tensor.view_as(tensor) for tensor in inputs]
        wanted = [alias.requires_grad_() for alias, need in zip(aliases, needed, strict=True) if need]
        result = function(*aliases)
        found = iter(torch.autograd.grad(result, wanted, upstream, create_graph=is_differentiated_again))
    return tuple(next(found) if need else None for need in needed)
