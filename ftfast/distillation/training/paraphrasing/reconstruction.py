"""Training a paraphraser without labels to reconstruct a teacher's feature maps, section 3.1 of the paper."""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ftfast.modules import Paraphraser

DISTANCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"l1": F.l1_loss, "mse": F.mse_loss}


def fit(
    paraphraser: Paraphraser,
    batches: Iterable[Tensor],
    optimiser: torch.optim.Optimizer,
    rate: Callable[[int], float],
    loss: str,
    cast: Callable[[], AbstractContextManager[Any]],
    after_step: Callable[[int], None] = lambda _: None,
    *,
    penalty: float = 0.0,
) -> None:
    """Trains a paraphraser in place, one step for each batch of feature maps, and leaves it in eval.

    Args:
        rate: a step's number, from 0, to its learning rate.
        loss: one of :data:`DISTANCES`.
        cast: the autocast of its forward; float16 gets a gradient scaler.
        after_step: called with the size of the batch after every step.
        penalty: what the factors' mean absolute value counts for beside the distance.
    """
    parameter = next(paraphraser.parameters())
    kind = parameter.device.type
    with cast():
        is_half = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == torch.float16
    scaler = torch.amp.GradScaler(kind, enabled=is_half)
    paraphraser.requires_grad_(True).train()
    for step, features in enumerate(batches):
        for group in optimiser.param_groups:
            group["lr"] = rate(step)
        batch = features.to(parameter).contiguous(memory_format=torch.channels_last)
        with cast():
            reconstruction = paraphraser(batch)
            size = paraphraser.encode(batch).float().abs().mean() if penalty else 0.0
        distance = DISTANCES[loss](reconstruction.to(batch.dtype), batch) + penalty * size
        optimiser.zero_grad(set_to_none=True)
        scaler.scale(distance).backward()
        scaler.step(optimiser)
        scaler.update()
        after_step(len(batch))
    paraphraser.eval()
