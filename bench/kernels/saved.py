"""What a loss keeps from its forward for its backward, in bytes."""

from typing import Any

import torch
from torch import Tensor

from bench.peer_losses import Loss


def saved_for_backward(loss: Loss, student_factor: Tensor, teacher_factor: Tensor) -> dict[str, int]:
    """Bytes kept between forward and backward.

    Counted are the storages of all tensors that autograd saves and of those that an ``autograd.Function`` keeps as
    attributes of its context, which hooks on saved tensors do not see; each storage once and whole, since whole it
    stays allocated. On a GPU the allocator is asked as well, which sees what neither does.

    Args:
        loss: run once, with gradients.
        student_factor, teacher_factor: any layout; the student's requires a gradient.

    Returns:
        ``saved_bytes``: all of it. ``saved_beyond_factors_bytes``: without the two factors' own storages; a factor
        that is kept is not copied, and the student's mostly lives on for the layer before. On a GPU
        ``allocated_for_backward_bytes``: what the allocator holds more after a forward than before it.
    """
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.layout == torch.strided:
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = storage
        return tensor

    device = student_factor.device
    before = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
    value = loss(student_factor, teacher_factor)
    found = {}
    if device.type == "cuda":
        found["allocated_for_backward_bytes"] = torch.cuda.memory_allocated(device) - before
    del value
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        value = loss(student_factor, teacher_factor)
    for tensor in _held_by_contexts(value.grad_fn):
        keep(tensor)
    factors = {factor.untyped_storage().data_ptr() for factor in (student_factor, teacher_factor)}
    found["saved_bytes"] = sum(storage.nbytes() for storage in kept.values())
    found["saved_beyond_factors_bytes"] = sum(
        storage.nbytes() for address, storage in kept.items() if address not in factors
    )
    return found


def _held_by_contexts(root: Any) -> list[Tensor]:
    """The tensors among the attributes of the graph's nodes; only nodes written in Python have attributes."""
    found: list[Tensor] = []
    seen, waiting = set(), [root]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        for held in getattr(node, "__dict__", {}).values():
            members = held if isinstance(held, (list, tuple)) else (held,)
            found += [member for member in members if isinstance(member, Tensor)]
        waiting += [parent for parent, _ in node.next_functions]
    return found
