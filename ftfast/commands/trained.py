"""A trained teacher or student, read back from its checkpoint folder."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ftfast.distillation.data.datasets import Dataset, described_dataset
from ftfast.distillation.runtime.checkpoint import SETTINGS_FILE, fill, load, read_description
from ftfast.errors import CheckpointError, shown

KINDS = ("teacher", "student")


@dataclass(frozen=True)
class Trained:
    """A model in eval mode, and what its checkpoint says of it: kind, model, data, dtype."""

    model: nn.Module
    description: dict[str, Any]

    @property
    def dataset(self) -> Dataset:
        """The data set that it was trained on."""
        return _dataset_of(self.description)

    @property
    def title(self) -> str:
        """``student resnet8 with 4 channels``."""
        model = self.description["model"]
        channels = f" with {model['channels']} channels" if model["channels"] else ""
        return f"{self.description['kind']} {shown(model['name'])}{channels}"


def _dataset_of(description: dict[str, Any]) -> Dataset:
    return described_dataset(description["data"], description.get("photographs"))


def describe_trained(folder: Path) -> dict[str, Any]:
    """What a checkpoint folder says of its model, without reading the model.

    Raises:
        CheckpointError: not a whole checkpoint of a teacher or student.
    """
    description = read_description(folder)
    if description.get("kind") not in KINDS:
        raise CheckpointError(
            f"{folder} is a checkpoint of kind {shown(repr(description.get('kind')))}; it takes teacher or student."
        )
    model = description.get("model")
    kinds = {"name": str, "channels": int, "shortcut": str}
    named = {"data", "dtype"} <= description.keys() and isinstance(model, dict) and model.keys() >= kinds.keys()
    typed = named and all(isinstance(dict(model or {})[key], kind) for key, kind in kinds.items())
    if not typed or description["model"]["channels"] < 0:
        raise CheckpointError(f"{folder} does not say what its model is: its {SETTINGS_FILE} was changed.")
    return description


def read_trained(folder: Path, device: torch.device) -> Trained:
    """The model of a checkpoint folder, on the device, channels_last, in eval mode.

    Raises:
        CheckpointError: not a whole checkpoint of a teacher or student.
    """
    from ftfast.distillation.phases.setup import build

    description = describe_trained(folder)
    found = load(folder)
    model = build(description["model"], _dataset_of(description), seed=0, device=device)
    fill(model, found.tensors, folder, shown(description["model"]["name"]))
    return Trained(model.eval(), description)
