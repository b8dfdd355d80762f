"""The running statistics of batch norms, kept from a forward that float16 let overflow."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn


class RunningStatistics:
    """Those of some modules, which one batch with infinities would make NaN for good.

    The scaler leaves the step of such a batch out, but its forward has been through the batch norms.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        buffers = (buffer for module in modules for buffer in module.buffers())
        self._running = [buffer for buffer in buffers if buffer.is_floating_point()]
        self._kept = self._copies()

    def _copies(self) -> list[Tensor]:
        return [buffer.detach().clone() for buffer in self._running]

    @torch.no_grad()
    def mend(self) -> None:
        """What is not finite goes back to what it was at the call before; nothing is waited for."""
        for buffer, kept in zip(self._running, self._kept, strict=True):
            buffer.copy_(torch.where(buffer.isfinite(), buffer, kept))
        self._kept = self._copies()
