"""One 3x3 convolution on the CPU, transposed or not, with its LeakyReLU, as autograd sees it: for paraphrasers in
training and wherever a translator runs by itself.
"""

from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ftfast.dispatch import kernels_for
from ftfast.ops.differentiable import gradients_through_torch
from ftfast.ops.ft_loss.function import needs_torch_operators
from ftfast.ops.maps import as_map, map_dtype, no_autocast
from ftfast.ops.memory import is_batched, plain, save, saved


def _kernels(x: Tensor, weight: Tensor, negative_slope: float, *, transposed: bool) -> ModuleType | None:
    """Those of ours that compute this layer; None for torch's own modules."""
    if torch.compiler.is_compiling() or not negative_slope > 0 or not x.is_floating_point():
        return None
    dtype = map_dtype(x)
    if x.dim() != 4 or x.numel() == 0 or x.device != weight.device or (x.dtype == dtype != weight.dtype):
        return None
    if x.shape[1] != weight.shape[0 if transposed else 1] or needs_torch_operators(x, weight):
        return None
    return kernels_for("conv3x3", x.device, dtype) if dtype in (torch.float32, torch.bfloat16) else None


def conv3x3_leaky_relu(
    x: Tensor, weight: Tensor, bias: Tensor | None, negative_slope: float, *, transposed: bool
) -> Tensor | None:
    """``leaky_relu(conv2d(x, weight, bias, padding=1), negative_slope)``, or with ``conv_transpose2d``.

    Args:
        x: ``[N, C, H, W]``, any strides.
        weight: ``[K, C, 3, 3]``, or ``[C, K, 3, 3]`` where transposed.
        bias: ``[K]``; without one it is no layer for kernels of ours.

    Returns:
        ``[N, K, H, W]`` channels_last, in autocast's dtype inside it, else in that of ``x``; None where torch's own
        modules have to compute it.
    """
    if bias is None or (kernels := _kernels(x, weight, negative_slope, transposed=transposed)) is None:
        return None
    return Conv3x3Function.apply(x, weight, bias, negative_slope, transposed, kernels)


class Conv3x3Function(torch.autograd.Function):
    """Saves its input, its output, which has the activation's sign, and the weight as it was computed with."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        negative_slope: float,
        transposed: bool,
        kernels: ModuleType,
    ) -> Tensor:
        dtype = map_dtype(x)
        with no_autocast(x.device.type):
            features = as_map(x, dtype)
            y = kernels.layer(features, plain(weight), plain(bias), negative_slope, transposed=transposed)
        save(ctx, x, weight, bias, features, y)
        ctx.negative_slope, ctx.transposed, ctx.kernels = negative_slope, transposed, kernels
        return y

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, features, y = saved(ctx)
        needed = ctx.needs_input_grad[:3]
        if torch.is_grad_enabled() or is_batched(upstream):
            return (*_differentiable_backward(ctx, x, weight, bias, upstream, y.dtype), None, None, None)
        with no_autocast(x.device.type):
            upstream = plain(upstream)
            dz = upstream.contiguous(memory_format=torch.channels_last)
            if dz is upstream or dz.data_ptr() == upstream.data_ptr():
                dz = dz.clone(memory_format=torch.channels_last)
            for_bias = ctx.kernels.leaky_relu_backward_(dz, y, ctx.negative_slope)
            for_input, for_weight = ctx.kernels.gradients(
                features, dz, weight, need_input=needed[0], need_weight=needed[1], transposed=ctx.transposed
            )
        return (
            None if for_input is None else for_input.to(x.dtype),
            for_weight,
            for_bias.to(bias.dtype) if needed[2] else None,
            None,
            None,
            None,
        )


def _differentiable_backward(
    ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, upstream: Tensor, dtype: torch.dtype
) -> tuple[Tensor | None, ...]:
    """Under create_graph the layer is computed again by torch, which can differentiate it twice."""
    convolve = F.conv_transpose2d if ctx.transposed else F.conv2d

    def layer(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        z = convolve(x.to(dtype), weight.to(dtype), bias.to(dtype), padding=1)
        return F.leaky_relu(z, ctx.negative_slope)

    return gradients_through_torch(layer, (x, weight, bias), ctx.needs_input_grad[:3], upstream)
