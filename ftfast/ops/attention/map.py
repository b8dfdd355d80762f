"""Attention maps and the gradient of their features as autograd sees them, over a backend's kernels."""

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ftfast import reference
from ftfast.dispatch import kernels_for
from ftfast.ops.memory import is_batched, plain, save, saved

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_LARGEST_EXPONENT = 4


def attention_map(features: Tensor, exponent: float, backend: str = "auto") -> Tensor:
    """``features ** exponent`` averaged over channels, ``[N, H*W]`` in float32 (float64 for float64).

    Args:
        features: ``[N, C, H, W]``, any strides.
        backend: "auto", "native" or "triton".
    """
    kernels = map_kernels(features, exponent, backend)
    if kernels is None:
        return reference.attention_map(features, exponent)
    if torch.is_grad_enabled() and features.requires_grad:
        return AttentionMapFunction.apply(features, int(exponent), kernels)
    return kernels.attention_map(dense(features), int(exponent))


def map_kernels(features: Tensor, exponent: float, backend: str) -> ModuleType | None:
    """Whose kernels compute this map; None for torch's operators."""
    if torch.compiler.is_compiling() or exponent not in range(1, _LARGEST_EXPONENT + 1) or features.numel() == 0:
        return None
    return kernels_for("attention", features.device, features.dtype, backend) if features.dtype in _DTYPES else None


class AttentionMapFunction(torch.autograd.Function):
    """Keeps the features alone."""

    @staticmethod
    def forward(ctx: Any, features: Tensor, exponent: int, kernels: ModuleType) -> Tensor:
        ctx.exponent, ctx.kernels = exponent, kernels
        save(ctx, features)
        return kernels.attention_map(dense(features), exponent)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
        (features,) = saved(ctx)
        if torch.is_grad_enabled() or is_batched(upstream):
            return _differentiable_gradient(features, upstream, ctx.exponent), None, None
        return ctx.kernels.attention_gradient(dense(features), plain(upstream).contiguous(), ctx.exponent), None, None


def _differentiable_gradient(features: Tensor, upstream: Tensor, exponent: int) -> Tensor:
    samples, channels, height, width = features.shape
    factor = upstream.view(samples, 1, height, width) * (exponent / channels)
    return (features.to(factor.dtype).pow(exponent - 1) * factor).to(features.dtype)


def dense(features: Tensor) -> Tensor:
    """Features as the kernels take them: contiguous or channels_last, with numbers in their memory."""
    features = plain(features)
    if features.is_contiguous() or features.is_contiguous(memory_format=torch.channels_last):
        return features
    return features.contiguous()
