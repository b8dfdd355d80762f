"""The phase before distillation: a paraphraser is trained to reconstruct a teacher's maps, or loaded from a file."""

import logging
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from ftfast.compat.timm.teacher import TeacherMaps
from ftfast.conversion.stand_ins import load_torch
from ftfast.conversion.state_dicts import convert_state_dict
from ftfast.errors import shown
from ftfast.modules import Paraphraser

_logger = logging.getLogger(__name__)

LEAST_EXPLAINED_VARIANCE = 0.5


def train_paraphraser(
    teacher: nn.Module,
    loader: Iterable[Any],
    *,
    layer: str | None = None,
    rate: float = 0.5,
    norm: str | None = None,
    epochs: int = 1,
    learning_rate: float = 1e-3,
) -> Paraphraser:
    """A paraphraser for a teacher's map, trained without labels by Adam on the squared error (the paper's equation 1).

    Under ``torch.autocast`` teacher and paraphraser follow it.

    Args:
        teacher: a timm model, or any other with a named layer; put in eval mode and run without a graph, on the
            device that it is on.
        loader: gives images ``[N, C, H, W]`` as the teacher takes them, or tuples whose first item they are; gone
            through ``epochs`` times.
        layer: the teacher's layer to take; None takes what ``forward_features`` returns.
        rate, norm: as :class:`ftfast.Paraphraser`.

    Raises:
        ValueError: a layer that the teacher does not have, an empty loader, or an argument out of range.
        RuntimeError: the loss is not finite.
    """
    maps = TeacherMaps(teacher, layer)
    parameter = next(teacher.parameters())
    paraphraser: Paraphraser | None = None
    for images in _images(loader):
        channels = maps(images.to(parameter)).shape[1]
        paraphraser = Paraphraser(channels, rate, norm=norm).to(parameter)
        break
    if paraphraser is None:
        raise ValueError("loader gives no batch; it takes one that gives images.")
    fit(paraphraser, maps, loader, epochs, learning_rate)
    return paraphraser


def fit(
    paraphraser: Paraphraser,
    maps: Callable[[Tensor], Tensor],
    loader: Iterable[Any],
    epochs: int,
    learning_rate: float,
) -> None:
    """Trains a paraphraser in place, and leaves it frozen and in eval."""
    if isinstance(epochs, bool) or not isinstance(epochs, int) or epochs < 1:
        raise ValueError(f"epochs is {epochs!r}; it takes a positive whole number.")
    if not 0 < learning_rate < math.inf:
        raise ValueError(f"learning_rate is {learning_rate!r}; it takes a positive number.")
    paraphraser.requires_grad_(True).train()
    parameter = next(paraphraser.parameters())
    optimiser = torch.optim.Adam(paraphraser.parameters(), lr=learning_rate)
    try:
        for epoch in range(epochs):
            batch = loss = None
            for images in _images(loader):
                batch = maps(images.to(parameter))
                loss = F.mse_loss(paraphraser(batch).to(parameter.dtype), batch.to(parameter.dtype))
                optimiser.zero_grad(set_to_none=True)
                loss.backward()
                optimiser.step()
            if batch is None or loss is None:
                raise ValueError(f"loader gives no batch in epoch {epoch + 1}; it takes one that gives images anew.")
            _report(loss.item(), batch, epoch + 1, judge=epoch + 1 == epochs and len(batch) > 1)
    finally:
        paraphraser.requires_grad_(False).eval()


def _images(loader: Iterable[Any]) -> Iterable[Tensor]:
    return (batch if isinstance(batch, Tensor) else batch[0] for batch in loader)


def _report(loss: float, batch: Tensor, epoch: int, *, judge: bool) -> None:
    if not math.isfinite(loss):
        raise RuntimeError(f"the paraphraser's loss is {loss} after epoch {epoch}; lower learning_rate.")
    variance = float(batch.float().var(0, correction=0).mean())
    explained = 1 - loss / variance if variance > 0 else 0.0
    _logger.info(f"Paraphraser epoch {epoch}: loss {loss:.4g}, {explained:.2f} of the variance explained")
    if judge and explained < LEAST_EXPLAINED_VARIANCE:
        _logger.warning(
            f"The paraphraser explains {explained:.2f} of its last batch's variance, less than "
            f"{LEAST_EXPLAINED_VARIANCE}; give it more epochs or another learning_rate."
        )


def load_paraphraser(path: str | Path) -> Paraphraser:
    """The paraphraser in a file of torch.save, of which nothing is run; its shapes say rate and batch norm.

    Args:
        path: a state_dict, or a checkpoint that holds one, one that timm wrote for a
            FactorTransferTask included, under the names of any project that :func:`ftfast.convert_state_dict` knows.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no paraphraser in it; the message has what was found.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"paraphraser is {str(path)!r}, which is no file; give the path of a checkpoint.")
    try:
        content, _ = load_torch(Path(path))
    except Exception as error:  # torch.load raises whatever its unpickler meets
        reason = shown(str(error).partition("\n")[0])
        raise ValueError(f"{path} cannot be read as a checkpoint of tensors ({reason}).") from error
    state = content.get("task_state") if isinstance(content, dict) else None
    try:
        tensors = convert_state_dict(content if state is None else state, part="" if state is None else "paraphraser")
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} has no paraphraser: {error}") from None
    if "decoder.0.weight" not in tensors:
        raise ValueError(f"{path} has a translator, or an encoder alone; give the path of a whole paraphraser.")
    return paraphraser_from(tensors)


def paraphraser_from(tensors: dict[str, Tensor]) -> Paraphraser:
    """A paraphraser of the shapes that a state_dict in ftfast's own names has, filled from it."""
    factor_channels, in_channels = tensors["encoder.1.weight"].shape[:2]
    norm = "batch" if "norm.0.weight" in tensors else None
    paraphraser = Paraphraser(in_channels, factor_channels=factor_channels, norm=norm)
    paraphraser.load_state_dict(tensors)
    return paraphraser.to(tensors["encoder.1.weight"].dtype)


def share(paraphraser: nn.Module, process_group: Any = None) -> None:
    """Gives every process the first one's paraphraser, where there are several."""
    if not (dist.is_available() and dist.is_initialized()):
        return
    first = 0 if process_group is None else dist.get_global_rank(process_group, 0)
    for tensor in (*paraphraser.parameters(), *paraphraser.buffers()):
        dist.broadcast(tensor.detach(), first, group=process_group)


def resolve_paraphraser(given: Any, channels: int, rate: float, norm: str | None) -> Paraphraser:
    """The paraphraser given, that of a checkpoint's path, or a new one, for maps of so many channels."""
    if given is None:
        return Paraphraser(channels, rate, norm=norm)
    paraphraser = load_paraphraser(given) if isinstance(given, str | Path) else given
    if not (hasattr(paraphraser, "encode") and hasattr(paraphraser, "factor_channels")):
        raise TypeError(
            f"paraphraser is a {type(paraphraser).__name__}; it takes a trained ftfast.Paraphraser or the path of a "
            "checkpoint."
        )
    if getattr(paraphraser, "in_channels", channels) != channels:
        raise ValueError(
            f"paraphraser takes maps of {paraphraser.in_channels} channels and the teacher's have {channels}; give "
            "one that was trained on this layer of this teacher."
        )
    return paraphraser


def fill(network: nn.Module, tensors: dict[str, Tensor], name: str, strict: bool) -> None:
    """Loads a checkpoint's translator or paraphraser into the task's."""
    own = network.state_dict()
    unlike = [key for key in own if key in tensors and own[key].shape != tensors[key].shape]
    if unlike:
        key = unlike[0]
        raise RuntimeError(
            f"the checkpoint's {name} has {key} of {list(tensors[key].shape)} and the task's of "
            f"{list(own[key].shape)}; build the task with the teacher, layers and rate that it was saved with."
        )
    network.load_state_dict(tensors, strict=strict)
