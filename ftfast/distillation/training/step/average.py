"""The moving average of a model's weights over steps: torch's AveragedModel without its copies from the CPU."""

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel


class Average(AveragedModel):
    """Each step ``average = decay * average + (1 - decay) * model``, buffers too; after the first, the model's own.

    :meth:`update_parameters` leaves ``n_averaged`` alone, which is on the CPU and no part of a CUDA graph.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        super().__init__(model, use_buffers=True)
        self._decay = decay

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        """Follows the model's step."""
        pairs = list(zip(_tensors(self.module), _tensors(model), strict=True))
        if not self.n_averaged:
            for own, new in pairs:
                own.copy_(new)
            return
        weights = [pair for pair in pairs if pair[0].is_floating_point()]
        torch._foreach_lerp_([own for own, _ in weights], [new for _, new in weights], 1 - self._decay)
        for own, new in pairs:
            if not own.is_floating_point():  # a count of batches
                own.copy_(own * self._decay + new * (1 - self._decay))


def _tensors(model: nn.Module) -> list[Tensor]:
    return [tensor.detach() for tensor in (*model.parameters(), *model.buffers())]
