"""Attention maps, the gradient of their features and the difference of two maps on the CPU, in C++ of our own."""

from typing import Any

import torch
from torch import Tensor

from ftfast.extension import extension

_CODES = {torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}


def attention_map(features: Tensor, exponent: int) -> Tensor:
    """``[N, C, H, W]``, contiguous or channels_last, to the mean over channels of its power, ``[N, H*W]`` float32."""
    samples, _, height, width = features.shape
    maps = features.new_empty(samples, height * width, dtype=torch.float32)
    extension().attention(_map_of(features, exponent), 0, maps.data_ptr())
    return maps


def attention_gradient(features: Tensor, upstream: Tensor, exponent: int) -> Tensor:
    """The gradient of ``features``, in their dtype and layout, from that of their map ``[N, H*W]`` float32."""
    gradient = torch.empty_like(features)
    extension().attention(_map_of(features, exponent), upstream.data_ptr(), gradient.data_ptr())
    return gradient


def attention_difference(
    student: Tensor, teacher_map: Tensor, exponent: int, p: int, eps: float, upstream: float | None
) -> tuple[Tensor, Tensor | None]:
    """``mean |q_s - q_t| ** p`` of maps over their norms, 0-d float32, and the student's gradient for ``upstream``.

    Every sample's features are still in cache when its gradient is written, which spares reading them again.

    Args:
        student: ``[N, C, H, W]``, contiguous or channels_last.
        teacher_map: ``[N, H*W]``, contiguous, float32.
        exponent, p: 1 to 4, and 1 or 2.
        eps: the floor of a norm.
        upstream: None for the loss alone.
    """
    gradient = None if upstream is None else torch.empty_like(student)
    loss = extension().attention_difference(
        _map_of(student, exponent),
        teacher_map.data_ptr(),
        0 if gradient is None else gradient.data_ptr(),
        p,
        eps,
        0.0 if upstream is None else upstream,
    )
    return torch.tensor(loss, dtype=torch.float32, device=student.device), gradient


def _map_of(features: Tensor, exponent: int) -> Any:
    samples, channels, height, width = features.shape
    return extension().AttentionMap(
        features.data_ptr(),
        _CODES[features.dtype],
        samples,
        channels,
        height * width,
        not features.is_contiguous(),
        exponent,
        torch.get_num_threads(),
    )
