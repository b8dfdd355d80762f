"""The mean of the processes' gradients: as torch's data parallelism has it, or in one sum between two CUDA graphs."""

import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ftfast.distillation.runtime.processes import Processes, translate_distributed_errors
from ftfast.distillation.training.methods import Terms


class _Loss(nn.Module):
    """The terms as the forward of the module that learns, which is what torch's data parallelism wraps."""

    def __init__(self, trainable: nn.Module, terms: Callable[..., Terms]) -> None:
        super().__init__()
        self.trainable = trainable
        self._terms = terms

    def forward(self, *batch: Tensor) -> Terms:
        return self._terms(*batch)


def data_parallel(trainable: nn.Module, terms: Callable[..., Terms]) -> DistributedDataParallel:
    """The terms, whose backward sums the processes' gradients as they come.

    Running statistics are looked at in evaluation alone, which takes the first process's: none travel here.
    """
    taken = inspect.signature(DistributedDataParallel.__init__).parameters
    name = "forward_sync_buffers" if "forward_sync_buffers" in taken else "broadcast_buffers"  # torch before 2.14
    options: dict[str, Any] = {name: False}
    return DistributedDataParallel(_Loss(trainable, terms), gradient_as_bucket_view=True, **options)


class FlatGradients:
    """The gradients of all parameters in one tensor, which is summed at once: nothing of torch's is in between.

    Args:
        parameters: of one dtype and device, the same in all processes; those of the first process are taken.
        processes: many.
    """

    def __init__(self, parameters: list[nn.Parameter], processes: Processes) -> None:
        self._parameters = parameters
        self._processes = processes
        sizes = [parameter.numel() for parameter in parameters]
        self._flat = torch.zeros(sum(sizes), dtype=parameters[0].dtype, device=parameters[0].device)
        self._views = [
            part.as_strided(parameter.shape, parameter.stride(), part.storage_offset())
            for part, parameter in zip(self._flat.split(sizes), parameters, strict=True)
        ]
        own = [parameter.detach() for parameter in parameters]
        torch._foreach_copy_(self._views, own)
        processes.take_from_first([self._flat])
        torch._foreach_copy_(own, self._views)
        self._flat.zero_()

    @torch.no_grad()
    def gather(self) -> None:
        """Lays the gradients together; a parameter without one stays without."""
        both = zip(self._parameters, self._views, strict=True)
        found = [(parameter, view) for parameter, view in both if parameter.grad is not None]
        gradients = [parameter.grad for parameter in self._parameters if parameter.grad is not None]
        torch._foreach_copy_([view for _, view in found], gradients)
        self._flat.div_(self._processes.part.ranks)
        for parameter, view in found:
            parameter.grad = view

    def reduce(self) -> None:
        """The mean over the processes, in all of them, in the place of each one's own."""
        with translate_distributed_errors():
            dist.all_reduce(self._flat)
