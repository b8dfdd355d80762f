"""capture_step: the step of a loop of one's own as a CUDA graph."""

import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from ftfast.distillation.training.step.graph import StepGraph


def _warn(reason: str) -> None:
    warnings.warn(reason, stacklevel=4)


def _check_optimizer(optimizer: torch.optim.Optimizer) -> None:
    """Raises ValueError where a step of it on a GPU waits for the learning rate."""
    name = type(optimizer).__name__
    for group in optimizer.param_groups:
        if not any(parameter.is_cuda for parameter in group["params"]):
            continue
        if not group.get("capturable", True):
            raise ValueError(f"optimizers has a {name} whose steps cannot be recorded; build it with capturable=True.")
        if "fused" in group and "capturable" not in group and not group["fused"]:
            raise ValueError(f"optimizers has a {name} that waits for its learning rate; build it with fused=True.")


def capture_step(
    step: Callable[..., Any],
    *,
    optimizers: torch.optim.Optimizer | Iterable[torch.optim.Optimizer] = (),
    frozen: Iterable[nn.Module] = (),
) -> StepGraph:
    """A step of a loop of one's own, ``step(images, labels, ...)``, which one GPU replays as one CUDA graph.

    On a CPU, and in the first three calls with each shape of batch, it runs as it is; then it is recorded and replayed,
    which costs the host one launch and a copy of each of the batch's tensors. Every call is one step. ``explain()``
    says how it runs; where it cannot be recorded, since it waits for the GPU or draws at random on the CPU, it goes on
    as it is, with a warning.

    ``step`` has all of it: forward, ``backward``, ``optimizer.step()``, and ``zero_grad(set_to_none=True)`` before
    them. It takes tensors on the GPU, constants, and floats, which reach it on a GPU as 0-d float32 tensors: so a
    loss's weight may change. What it returns, a tensor or a tuple or dictionary of them, is written to again by the
    next call: ``clone()`` what is kept. Python in it runs while it is recorded and not afterwards, so other numbers
    that change have to be tensors, written to in place. Learning rates of ``optimizers`` are
    such tensors from the first call on, whether a scheduler sets them or the loop does.

    Args:
        step: the step.
        optimizers: those that step in it; on a GPU SGD takes ``fused=True`` and Adam ``capturable=True``.
        frozen: modules that it reads and does not train, such as a teacher and a paraphraser: after a write to one of
            them the step is recorded anew.

    Raises:
        TypeError: an argument of another kind.
        ValueError: an optimizer on a GPU whose step cannot be recorded as it is built.
    """
    given = (optimizers,) if isinstance(optimizers, torch.optim.Optimizer) else tuple(optimizers)
    modules = (frozen,) if isinstance(frozen, nn.Module) else tuple(frozen)
    if not callable(step):
        raise TypeError(f"step is a {type(step).__name__}; it takes a function of a batch.")
    for name, found, kind in (("optimizers", given, torch.optim.Optimizer), ("frozen", modules, nn.Module)):
        for it in found:
            if not isinstance(it, kind):
                raise TypeError(f"{name} has a {type(it).__name__}; it takes a {kind.__name__} or several.")
    for optimizer in given:
        _check_optimizer(optimizer)
    return StepGraph(step, optimizers=given, frozen=modules, say=_warn)
