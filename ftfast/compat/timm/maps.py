"""What timm's models say of their images, and of the feature maps that they give."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ftfast.features.feature_maps import feature_map

__all__ = ["check_forward_features", "check_sizes", "feature_map", "input_size_of", "shape_of_map"]
USUAL_INPUT_SIZE = (3, 224, 224)


def check_forward_features(model: nn.Module, side: str) -> None:
    """Raises ValueError, naming what to give, where a model has not the two halves that timm's have."""
    if not (hasattr(model, "forward_features") and hasattr(model, "forward_head")):
        raise ValueError(
            f"{side}_layer is None and the {side}, a {type(model).__name__}, has no forward_features and forward_head; "
            f"give the name of the layer to take, {side}_layer=... (ftfast features lists them)."
        )


def input_size_of(model: nn.Module) -> tuple[int, int, int]:
    """The ``(channels, height, width)`` that a timm model was made for; 3x224x224 where it does not say."""
    configuration = getattr(model, "pretrained_cfg", None) or {}
    channels, height, width = configuration.get("input_size") or USUAL_INPUT_SIZE
    fixed = getattr(getattr(model, "patch_embed", None), "img_size", None)
    height, width = fixed or (height, width)
    return getattr(model, "in_chans", None) or channels, height, width


@torch.no_grad()
def shape_of_map(read: Callable[[Tensor], Tensor], model: nn.Module, input_size: Sequence[int]) -> tuple[int, int, int]:
    """The ``(C, H, W)`` of the map that ``read`` gives for one image; the model's mode and state stay as they are."""
    parameter = next(model.parameters(), torch.empty(0))
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        found = read(torch.zeros(1, *input_size, device=parameter.device, dtype=parameter.dtype))
    finally:
        for module, mode in modes.items():
            module.training = mode
    _, channels, height, width = found.shape
    return channels, height, width


def check_sizes(student: Sequence[int] | None, teacher: Sequence[int] | None, images: Sequence[int]) -> None:
    """Raises ValueError where two maps ``(C, H, W)``, both known, have not the same height and width."""
    if student is not None and teacher is not None and tuple(student[1:]) != tuple(teacher[1:]):
        raise ValueError(
            f"on images of {images} the student's map is {student[1]}x{student[2]} and the teacher's "
            f"{teacher[1]}x{teacher[2]}; give layers of one size by student_layer and teacher_layer."
        )
