"""One distillation step, watched from outside: which modules ran, in which mode, and what reaches the loss."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as hooks

StepLoss = Callable[[nn.Module, nn.Module, Any], Tensor]


@dataclass
class Call:
    """One call of a module without children: its tensor inputs, and whether autograd and autocast were at work."""

    module: nn.Module
    inputs: list[Tensor]
    records_graph: bool
    autocasts: bool
    seconds: float


@dataclass
class Observed:
    """What one step did.

    Attributes:
        calls: of modules without children, in order.
        whole: the inputs of every call of a module with children, the last one of each module.
        loss: the step's loss, detached.
        seconds: of forward and backward.
        reached: the leaves of the loss's graph: the parameters that get a gradient.
    """

    calls: list[Call] = field(default_factory=list)
    whole: dict[nn.Module, list[Tensor]] = field(default_factory=dict)
    loss: Tensor = field(default_factory=lambda: torch.empty(0))
    seconds: float = 0.0
    reached: list[Tensor] = field(default_factory=list)


def observe(student: nn.Module, teacher: nn.Module, loss: StepLoss, batch: Any) -> Observed:
    """Runs forward and backward once; parameters, their ``.grad``, buffers and random states stay as they were.

    What torch.compile has compiled runs as it was written, since compiled code has no modules to watch.
    """
    found = Observed()
    begun: list[float] = []

    def before(module: nn.Module, inputs: Any) -> None:
        begun.append(_now())

    def after(module: nn.Module, inputs: Any, output: Any) -> None:
        seconds = _now() - begun.pop()
        tensors = [each for each in inputs if isinstance(each, Tensor)]
        if next(module.children(), None) is None:
            records = isinstance(output, Tensor) and output.requires_grad
            device = tensors[0].device.type if tensors else "cpu"
            found.calls.append(Call(module, tensors, records, torch.is_autocast_enabled(device), seconds))
        else:
            found.whole[module] = tensors

    handles = [hooks.register_module_forward_pre_hook(before), hooks.register_module_forward_hook(after)]
    with _untouched(student, teacher), torch.compiler.set_stance("force_eager"):
        try:
            start = _now()
            value = loss(student, teacher, batch)
        finally:
            for handle in handles:
                handle.remove()
        found.reached = _leaves(value)
        if found.reached and value.numel() == 1:
            torch.autograd.grad(value, found.reached, allow_unused=True)
        found.loss = value.detach().clone()
        found.seconds = _now() - start
    return found


def loss_without(student: nn.Module, teacher: nn.Module, loss: StepLoss, batch: Any, modules: set[nn.Module]) -> Tensor:
    """The step's loss with the outputs of these modules replaced by zeros."""
    handles = [
        # Before the hooks that are there, of which one may be what takes the features.
        module.register_forward_hook(
            lambda m, inputs, output: output * 0 if isinstance(output, Tensor) else output, prepend=True
        )
        for module in modules
    ]
    try:
        with _untouched(student, teacher), torch.no_grad():
            return loss(student, teacher, batch).detach().clone()
    finally:
        for handle in handles:
            handle.remove()


def _now() -> float:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


@contextmanager
def _untouched(*models: nn.Module) -> Iterator[None]:
    buffers = [(buffer, buffer.clone()) for model in models for buffer in model.buffers()]
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        with torch.no_grad():
            for buffer, kept in buffers:
                buffer.copy_(kept)


def _leaves(value: Tensor) -> list[Tensor]:
    seen, leaves = set(), []
    open_nodes = [value.grad_fn] if value.grad_fn is not None else []
    while open_nodes:
        node = open_nodes.pop()
        if node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            leaves.append(node.variable)
        open_nodes += [below for below, _ in node.next_functions if below is not None]
    return leaves
