"""The frozen teacher: built from the settings, or read from a checkpoint that has to be of the same model."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ftfast.distill import checkpoint, models
from ftfast.distill.data import DATASETS
from ftfast.distill.errors import CheckpointError
from ftfast.distill.methods import Outputs
from ftfast.distill.settings import Settings
from ftfast.features import FeatureTap


def teacher_description(settings: Settings) -> dict[str, Any]:
    """What the settings say the teacher is, as its checkpoint keeps it."""
    return {"name": settings.teacher, "channels": settings.teacher_channels, "shortcut": settings.shortcut}


def student_description(settings: Settings) -> dict[str, Any]:
    """What the settings say a student is, as its checkpoint keeps it."""
    return {"name": settings.student, "channels": settings.student_channels, "shortcut": settings.shortcut}


def build(description: dict[str, Any], data: str, *, seed: int, device: torch.device) -> models.ResNet:
    """The described model for the images of a data set, channels_last on the device."""
    dataset = DATASETS[data]
    model = models.build_model(**description, in_channels=dataset.image_shape[0], classes=dataset.classes, seed=seed)
    return models.place(model, device)


class Teacher(nn.Module):
    """A model frozen for good: eval mode whatever is asked of it, no gradients, no graph."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model.requires_grad_(False)
        self._tap = FeatureTap(self.model, models.LAST_STAGE)
        self.eval()

    def train(self, mode: bool = True) -> "Teacher":
        """Stays in eval mode."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Outputs:
        """``[N, C, H, W]`` to logits and last features."""
        return Outputs(*self._tap(images))


def read_teacher_checkpoint(settings: Settings) -> dict[str, Tensor]:
    """The tensors that ``settings.teacher_checkpoint`` names, checked against the teacher that the settings describe.

    Raises:
        CheckpointError: not readable, not plain tensors, or of another model.
    """
    assert settings.teacher_checkpoint is not None
    path = Path(settings.teacher_checkpoint)
    tensors, description = checkpoint.load_tensors(path)
    expected = teacher_description(settings)
    title = f"a {settings.teacher} with {settings.teacher_channels} channels and {settings.shortcut} shortcuts"
    found = description.get("model", expected)
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} does not say what its model is: its settings.json was changed.")
    if found != expected:
        raise CheckpointError(
            f"{path} is a checkpoint of another model than {title}: a {found.get('name')} with "
            f"{found.get('channels')} channels and {found.get('shortcut')} shortcuts; give --teacher, "
            "--teacher-channels and --shortcut to match."
        )
    checkpoint.fill(build(expected, settings.data, seed=0, device=torch.device("cpu")), tensors, path, title)
    return tensors
