"""The teacher: built from the settings, or read from a checkpoint that has to be of the same model."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ftfast.distill.data.in_memory import Dataset
from ftfast.distill.models import checkpoint_names, libraries, registry
from ftfast.distill.runtime import checkpoint
from ftfast.distill.settings.run_settings import Settings
from ftfast.distill.training.methods import Outputs
from ftfast.errors import CheckpointError
from ftfast.features import FeatureTap


def teacher_description(settings: Settings) -> dict[str, Any]:
    """What the settings say the teacher is, as its checkpoint keeps it."""
    return {"name": settings.teacher, "channels": settings.teacher_channels, "shortcut": settings.shortcut}


def student_description(settings: Settings) -> dict[str, Any]:
    """What the settings say a student is, as its checkpoint keeps it."""
    return {"name": settings.student, "channels": settings.student_channels, "shortcut": settings.shortcut}


def build(
    description: dict[str, Any], dataset: Dataset, *, seed: int, device: torch.device, pretrained: bool = False
) -> nn.Module:
    """The described model for the images of a data set, channels_last on the device."""
    model = registry.build_model(
        **description,
        in_channels=dataset.image_shape[0],
        classes=dataset.classes,
        seed=seed,
        pretrained=pretrained,
    )
    return registry.place(model, device)


class Teacher(nn.Module):
    """A model in eval mode whatever is asked of it, without gradients or a graph, and otherwise as it is.

    The plain engine's; :class:`ftfast.distill.models.frozen_teacher.FrozenTeacher` is faster and checked against it.
    """

    def __init__(self, model: nn.Module, layer: str = registry.LAST_STAGE) -> None:
        super().__init__()
        self.model = model.requires_grad_(False)
        self._tap = FeatureTap(self.model, layer)
        self.eval()

    def train(self, mode: bool = True) -> "Teacher":
        """Stays in eval mode."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Outputs:
        """``[N, C, H, W]`` to logits and last features."""
        return Outputs(*self._tap(images))


def read_teacher(settings: Settings) -> dict[str, Tensor]:
    """The tensors of a teacher that is not trained here, checked against the one that the settings describe.

    They are those that ``settings.teacher_checkpoint`` names, or its library's.

    Raises:
        CheckpointError: not readable, not plain tensors, or of another model.
        SettingsError: a library's weights that cannot be had, or are for other classes.
    """
    dataset = settings.dataset()
    if settings.teacher_checkpoint is None:
        return libraries.pretrained_tensors(
            settings.teacher, in_channels=dataset.image_shape[0], classes=dataset.classes
        )
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
    model = build(expected, dataset, seed=0, device=torch.device("cpu"))
    tensors = checkpoint_names.to_own_layout(tensors, model, path, settings.data)
    checkpoint.fill(model, tensors, path, title)
    return tensors
