"""What a timm model gives as features, as the feature map ``[N, C, H, W]`` that Factor Transfer takes."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

USUAL_INPUT_SIZE = (3, 224, 224)


def feature_map(
    features: Tensor,
    model: nn.Module | None = None,
    image_size: Sequence[int] | None = None,
    layer: nn.Module | None = None,
) -> Tensor:
    """Features as a map ``[N, C, H, W]``, of any floating dtype; a view, never a copy.

    Args:
        features: a map ``[N, C, H, W]``, or ``[N, H, W, C]`` from a layer or model whose ``output_fmt`` is ``"NHWC"``
            (Swin); or tokens ``[N, L, C]``, in rows of the picture from top to bottom, behind the model's
            ``num_prefix_tokens`` class and register tokens, which are dropped.
        model: the timm model that made them; without one, maps are NCHW and tokens have no prefix.
        image_size: the images' ``(height, width)``, for a grid of tokens that is not square.
        layer: the model's layer that made them, where it was not the last.

    Raises:
        TypeError: features that are no tensor.
        ValueError: of another number of dimensions, or tokens that fill no grid.
    """
    if not isinstance(features, Tensor):
        raise TypeError(
            f"features are a {type(features).__name__}; they must be one tensor, so name a layer with a single output."
        )
    if features.dim() == 4:
        layout = getattr(layer, "output_fmt", None) or getattr(model, "output_fmt", None)
        return features.permute(0, 3, 1, 2) if layout == "NHWC" else features
    if features.dim() != 3:
        raise ValueError(
            f"features are {list(features.shape)}; Factor Transfer takes maps [N, C, H, W] or tokens [N, L, C], so "
            "name a layer before the pooling."
        )
    prefix = int(getattr(model, "num_prefix_tokens", 0))
    for dropped in (prefix, 0):  # layers before the class token joins have none
        count = features.shape[1] - dropped
        for rows, columns in _grids(count, model, image_size):
            if rows * columns == count > 0:
                return features[:, dropped:].unflatten(1, (rows, columns)).permute(0, 3, 1, 2)
    raise ValueError(
        f"features are {features.shape[1]} tokens, {prefix} of them class or register tokens, and the rest fill no "
        "grid; name a layer whose tokens are those of all patches."
    )


def _grids(count: int, model: nn.Module | None, image_size: Sequence[int] | None) -> list[tuple[int, int]]:
    """The grids that ``count`` tokens may have, the likeliest first."""
    patches: Any = getattr(model, "patch_embed", None)
    found = []
    if image_size is not None and hasattr(patches, "dynamic_feat_size"):
        found.append(patches.dynamic_feat_size(tuple(image_size)))
    if getattr(patches, "grid_size", None) is not None:
        found.append(patches.grid_size)
    side = math.isqrt(max(count, 0))
    return [*found, (side, side)]


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
