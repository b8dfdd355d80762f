"""The phase before distillation: a paraphraser is trained to reconstruct a teacher's maps, or loaded from a file."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from ftfast.compat.timm.teacher import TeacherMaps
from ftfast.conversion.stand_ins import load_torch
from ftfast.conversion.state_dicts import convert_state_dict
from ftfast.distillation.training.paraphrasing import paraphraser as training
from ftfast.errors import shown
from ftfast.modules import Paraphraser


def train_paraphraser(
    teacher: nn.Module, loader: Iterable[Any], *, layer: str | None = None, **options: Any
) -> Paraphraser:
    """:func:`ftfast.train_paraphraser` on a timm model's maps; under ``torch.autocast`` both networks follow it.

    Args:
        teacher: a timm model, or any other with a named layer; put in eval mode and run without a graph, on the
            device that it is on.
        loader: gives images ``[N, C, H, W]`` as the teacher takes them, or tuples whose first item they are.
        layer: the teacher's layer to take, tokens as maps; None takes what ``forward_features`` returns.
        options: the rest of :func:`ftfast.train_paraphraser`'s.

    Raises:
        ValueError: a layer that the teacher does not have, an empty loader, or an argument out of range.
        ParaphraserError: factors that are of no use.
    """
    return training.train_paraphraser(TeacherMaps(teacher, layer), loader, **options)


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


def is_first() -> bool:
    """Whether this process is the first of its group, or alone."""
    return not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0


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
