"""What a model gives as features, as the feature map ``[N, C, H, W]`` that Factor Transfer takes."""

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn


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
