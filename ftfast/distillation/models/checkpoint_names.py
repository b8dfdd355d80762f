"""Other projects' names for the tensors of the same networks, so that their checkpoints can be teachers here."""

import re
from pathlib import Path

import torch
from torch import Tensor, nn

from ftfast.conversion.layouts import AVERAGES
from ftfast.distillation.models.cifar import VGG, ResNet, WideResNet
from ftfast.errors import CheckpointError

_PREFIXES = ("module.", "_orig_mod.", "model.")
# What is common to the authors' code and the CIFAR networks that most projects share.
_COMMON_RULES = (
    (r"^conv1\.", "stem."),
    (r"^bn1\.", "norm."),
    (r"\.bn(\d)\.", r".norm\1."),
    (r"^(?:linear|fc)\.", "classifier."),
)
_RULES = {
    ResNet: ((r"^layer(\d)\.", r"stage\1."), (r"\.(?:shortcut|downsample)\.", ".projection.")),
    WideResNet: (
        (r"^(?:layer|block)(\d)\.(?:layer\.)?", r"stage\1."),
        (r"\.(?:shortcut\.0|convShortcut)\.", ".projection."),
    ),
}


def to_own_layout(tensors: dict[str, Tensor], model: nn.Module, path: Path, data: str) -> dict[str, Tensor]:
    """The tensors under the names that ``model`` has for them; names that nothing is known of stay.

    Known are the prefixes of DataParallel, compiled and averaged modules in any order, the layout of the authors' code
    and of the CIFAR ResNets, WRNs and VGGs that most projects share, and for models of torchvision and timm those
    libraries' own.

    Args:
        path, data: what an error is about.

    Raises:
        CheckpointError: a classifier for another number of classes than the data have.
    """
    own = model.state_dict()
    tensors = _unwrapped(tensors, own)
    if not own.keys() <= tensors.keys():
        tensors = _renamed(tensors, model)
    for name, value in own.items():  # checkpoints of torch before 0.4.1 lack these counters
        if name.endswith("num_batches_tracked") and name not in tensors:
            tensors[name] = torch.zeros_like(value)
    _check_classes(tensors, own, path, data)
    return tensors


def _unwrapped(tensors: dict[str, Tensor], own: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without what stands before all names, in any order and number, and without AveragedModel's counts."""
    tensors = {name: tensor for name, tensor in tensors.items() if name.rpartition(".")[2] != AVERAGES}
    while tensors and not own.keys() <= tensors.keys():
        prefix = next((prefix for prefix in _PREFIXES if all(name.startswith(prefix) for name in tensors)), None)
        if prefix is None:
            break
        tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    return tensors


def _renamed(tensors: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    if isinstance(model, VGG):
        return _in_order(tensors, model)
    if type(model) not in _RULES:
        return tensors
    renamed = {}
    for name, tensor in tensors.items():
        for pattern, replacement in (*_COMMON_RULES, *_RULES[type(model)]):
            name = re.sub(pattern, replacement, name)
        renamed[name] = tensor
    return renamed


def _in_order(tensors: dict[str, Tensor], model: VGG) -> dict[str, Tensor]:
    """VGGs number their layers in many ways, but all in one order; where a shape differs, nothing is renamed."""
    counter = "num_batches_tracked"
    own = {name: value for name, value in model.state_dict().items() if not name.endswith(counter)}
    theirs = {name: value for name, value in tensors.items() if not name.endswith(counter)}
    pairs = list(zip(own.items(), theirs.items(), strict=False))
    fits = len(own) == len(theirs) and all(
        name.rsplit(".")[-1] == other.rsplit(".")[-1] and (value.shape == given.shape or name.startswith("classifier"))
        for (name, value), (other, given) in pairs
    )
    return {name: given for (name, _), (_, given) in pairs} if fits else dict(tensors)


def _check_classes(tensors: dict[str, Tensor], own: dict[str, Tensor], path: Path, data: str) -> None:
    last = [name for name, value in own.items() if value.dim() == 2][-1:]
    for name in last:
        given = tensors.get(name)
        if given is not None and given.dim() == 2 and len(given) != len(own[name]):
            raise CheckpointError(
                f"{path} is of a teacher for {len(given)} classes, and {data} has {len(own[name])}; "
                "give one that was trained on these data."
            )
