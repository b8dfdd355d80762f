"""The difference of two attention maps in plain torch, with any power and any order."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ftfast.compat.directions import direction


def attention_difference(
    student_features: Tensor, teacher_features: Tensor, *, exponent: float = 2, p: float = 1
) -> Tensor:
    """The mean over N*H*W of ``|q(s) - q(t)|`` for p=1, else of ``(q(s) - q(t)) ** p``, without a root.

    ``q(f)`` is ``f ** exponent`` averaged over channels, as a unit vector over H*W; HobbitLong/RepDistiller,
    ``distiller_zoo/FT.py``.

    Args:
        student_features, teacher_features: ``[N, C, H, W]``, floating point, any strides; C may differ. Where H
            differs, the larger map is pooled to squares of the other's height.
        exponent: of the features.
        p: of the difference.

    Returns:
        0-d, float64 where a map is float64, else float32.

    Raises:
        TypeError: maps that are no floating-point tensors.
        ValueError: maps of other dimensions, samples or devices, or of unlike widths after pooling.
    """
    _check(student_features, teacher_features)
    difference = _map(student_features, teacher_features, exponent) - _map(teacher_features, student_features, exponent)
    return (difference.abs() if p == 1 else difference.pow(p)).mean()


def _map(features: Tensor, other: Tensor, exponent: float) -> Tensor:
    """``[N, H*W]`` at the size of the smaller of the two maps."""
    height = min(features.shape[2], other.shape[2])
    wide = features if features.dtype == torch.float64 else features.float()
    if features.shape[2] != height:
        wide = F.adaptive_avg_pool2d(wide, (height, height))
    return direction(wide.pow(exponent).mean(1))


def _check(student: Tensor, teacher: Tensor) -> None:
    for name, features in (("student_features", student), ("teacher_features", teacher)):
        if not isinstance(features, Tensor) or not features.is_floating_point():
            kind = f"a tensor of {features.dtype}" if isinstance(features, Tensor) else f"a {type(features).__name__}"
            raise TypeError(f"{name} is {kind}; it takes a floating-point map [N, C, H, W].")
        if features.dim() != 4:
            raise ValueError(f"{name} has shape {tuple(features.shape)}; it takes a map [N, C, H, W].")
    if student.shape[0] != teacher.shape[0] or student.device != teacher.device:
        sides = [f"{side.shape[0]} samples on {side.device}" for side in (student, teacher)]
        raise ValueError(
            f"student_features has {sides[0]} and teacher_features {sides[1]}; both must see one batch, on one device."
        )
    height = min(student.shape[2], teacher.shape[2])
    widths = [side.shape[3] if side.shape[2] == height else height for side in (student, teacher)]
    if widths[0] != widths[1]:
        raise ValueError(
            f"student_features has maps of {tuple(student.shape[2:])} and teacher_features of "
            f"{tuple(teacher.shape[2:])}; only square maps are pooled to each other, so pool one side yourself."
        )
