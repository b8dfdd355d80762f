"""Attention maps and the gradient of their features on the CPU, in C++ of our own."""

import torch
from torch import Tensor

from ftfast.extension import extension

_CODES = {torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}


def attention_map(features: Tensor, exponent: int) -> Tensor:
    """``[N, C, H, W]``, contiguous or channels_last, to the mean over channels of its power, ``[N, H*W]`` float32."""
    maps = torch.empty(features.shape[0], features.shape[2] * features.shape[3], dtype=torch.float32)
    _run(features, None, maps, exponent)
    return maps


def attention_gradient(features: Tensor, upstream: Tensor, exponent: int) -> Tensor:
    """The gradient of ``features``, in their dtype and layout, from that of their map ``[N, H*W]`` float32."""
    gradient = torch.empty_like(features)
    _run(features, upstream, gradient, exponent)
    return gradient


def _run(features: Tensor, upstream: Tensor | None, result: Tensor, exponent: int) -> None:
    samples, channels, height, width = features.shape
    extension().attention(
        features.data_ptr(),
        0 if upstream is None else upstream.data_ptr(),
        result.data_ptr(),
        _CODES[features.dtype],
        samples,
        channels,
        height * width,
        not features.is_contiguous(),
        exponent,
        torch.get_num_threads(),
    )
