"""The moving average of a model's weights over steps: torch's AveragedModel without its copies from the CPU."""

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel


class Average(AveragedModel):
    """Each step ``average = decay * average + (1 - decay) * model``, buffers too; after the first, the model's own.

    :meth:`update_parameters` leaves ``n_averaged`` alone, which is on the CPU and no part of a CUDA graph. The decay is
    read where the model is, so a graph follows it where it is set to another.
    """

    _share: Tensor

    def __init__(self, model: nn.Module, decay: float) -> None:
        super().__init__(model, use_buffers=True)
        device = next(model.parameters()).device
        self.register_buffer("_share", torch.empty((), device=device), persistent=False)
        self.decay = decay

    @property
    def decay(self) -> float:
        """What is left of the average in each step; may be set at any time."""
        return self._decay

    @decay.setter
    def decay(self, decay: float) -> None:
        self._decay = decay
        self._share.fill_(1 - decay)

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        """Follows the model's step."""
        pairs = list(zip(_tensors(self.module), _tensors(model), strict=True))
        if not self.n_averaged:
            for own, new in pairs:
                own.copy_(new)
            return
        weights = [pair for pair in pairs if _is_continuous(pair[0])]
        averages = [own for own, _ in weights]
        steps = torch._foreach_sub([new for _, new in weights], averages)
        torch._foreach_mul_(steps, self._share)
        torch._foreach_add_(averages, steps)
        share = self._share.double()
        for own, new in pairs:
            if not _is_continuous(own):  # a count of batches, an index, a mask
                own.copy_(torch.lerp(own.double(), new.double(), share))


def _is_continuous(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _tensors(model: nn.Module) -> list[Tensor]:
    return [tensor.detach() for tensor in (*model.parameters(), *model.buffers())]
