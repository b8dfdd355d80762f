"""A convolution with the batch norm, residual and ReLU behind it, in training on the CPU.

    y = relu(batch_norm(conv(x)) + residual)

C++ of our own does what follows the convolution in two reads of the convolution's result and one write, and in backward
in two reads of each map and one write. Backward keeps x, the convolution's result and, behind a residual, y, where
modules one by one keep the norm's result and the sum too. Ioffe, Szegedy, "Batch Normalization", ICML 2015.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ftfast.extension import extension, load_extension
from ftfast.ops.conv3x3 import direct
from ftfast.ops.conv3x3.native import cast_weight, gradients
from ftfast.ops.maps import as_map, map_dtype, no_autocast
from ftfast.ops.memory import lies_in_memory, save, saved

_CODES = {torch.float32: 1, torch.bfloat16: 2}


@dataclass(frozen=True)
class Layer:
    """What the function needs besides tensors: the two modules, read at every step, and what follows them."""

    convolution: nn.Conv2d
    norm: nn.BatchNorm2d
    relu: bool

    @property
    def geometry(self) -> tuple[list[int], list[int], list[int]]:
        """Stride, padding and dilation."""
        convolution = self.convolution
        return list(convolution.stride), list(convolution.padding), list(convolution.dilation)  # type: ignore[arg-type]

    @property
    def is_plain_3x3(self) -> bool:
        """Whether it is the convolution that ftfast.ops.conv3x3.native knows."""
        return self.convolution.kernel_size == (3, 3) and self.geometry == ([1, 1], [1, 1], [1, 1])


def fits(convolution: nn.Module, norm: nn.Module) -> bool:
    """Whether these two modules are of the kind that is computed here, whatever they are given."""
    return (
        type(convolution) is nn.Conv2d
        and convolution.groups == 1
        and convolution.padding_mode == "zeros"
        and not isinstance(convolution.padding, str)
        and type(norm) is nn.BatchNorm2d
        and norm.affine
        and norm.track_running_stats
        and norm.momentum is not None
        and not any(module._forward_hooks or module._forward_pre_hooks for module in (convolution, norm))
        and not any(module._backward_hooks or module._backward_pre_hooks for module in (convolution, norm))
        and load_extension()[0] is not None
    )


def can_run(layer: Layer, x: Tensor, residual: Tensor | None = None) -> bool:
    """Whether the layer can be computed here for this input and residual, now."""
    norm = layer.norm
    if residual is not None and (residual.dtype != map_dtype(x) or residual.shape != _result_shape(layer, x)):
        return False
    return (
        norm.training
        and torch.is_grad_enabled()
        and x.device.type == "cpu"
        and x.dim() == 4
        and map_dtype(x) in _CODES
        and x.dtype in _CODES
        and x.numel() > 0
        and all(_is_plain_float32(each) for each in (norm.weight, norm.bias, norm.running_mean, norm.running_var))
        and layer.convolution.weight.dtype == torch.float32
    )


def _is_plain_float32(tensor: Tensor | None) -> bool:
    """Whether the extension may read and write a norm's tensor where it lies."""
    return (
        tensor is not None
        and tensor.dtype == torch.float32
        and tensor.device.type == "cpu"
        and tensor.is_contiguous()
        and lies_in_memory(tensor)
    )


def _result_shape(layer: Layer, x: Tensor) -> tuple[int, ...]:
    sizes = (
        (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
        for size, kernel, stride, padding, dilation in zip(
            x.shape[2:], layer.convolution.kernel_size, *layer.geometry, strict=True
        )
    )
    return (x.shape[0], layer.convolution.out_channels, *sizes)


def convolution_norm(layer: Layer, x: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """``relu(batch_norm(conv(x)) + residual)``, and ``x``; running statistics move as the module's do.

    Args:
        layer: for which :func:`can_run` with these inputs.
        x: ``[N, C, H, W]``.
        residual: ``[N, K, H', W']``, or None.

    Returns:
        The result, channels_last in the dtype that torch would convolve in, and ``x`` for whoever else reads it:
        that reader's gradient then is added inside the convolution of backward.
    """
    assert layer.norm.num_batches_tracked is not None
    layer.norm.num_batches_tracked.add_(1)
    return _ConvolutionNorm.apply(
        x,
        layer.convolution.weight,
        layer.convolution.bias,
        layer.norm.weight,
        layer.norm.bias,
        residual,
        layer,
        map_dtype(x),
    )


class _ConvolutionNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        norm_weight: Tensor,
        norm_bias: Tensor,
        residual: Tensor | None,
        layer: Layer,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        stride, padding, dilation = layer.geometry
        norm = layer.norm
        with no_autocast("cpu"):
            operand = as_map(x, dtype)
            if layer.is_plain_3x3 and direct.takes(dtype, *weight.shape[:2]):
                z = direct.convolve(operand, direct.pack(weight), None if bias is None else bias.float())
            else:
                bias = None if bias is None else bias.to(dtype)
                z = as_map(F.conv2d(operand, _cast(weight, dtype), bias, stride, padding, dilation), dtype)
            if residual is not None:
                residual = as_map(residual, dtype)
        samples, channels, height, width = z.shape
        if samples * height * width == 1:
            raise ValueError("a batch norm in training was given a single number for each channel; take more images.")
        y = torch.empty_like(z)
        statistics = torch.empty(2, channels, dtype=torch.float32, device=z.device)
        addresses = (z, residual, y, norm_weight, norm_bias, norm.running_mean, norm.running_var, *statistics)
        extension().batch_norm_forward(
            _addresses(addresses),
            _CODES[dtype],
            samples * height * width,
            channels,
            norm.eps,
            norm.momentum,
            layer.relu,
            torch.get_num_threads(),
        )
        ctx.layer, ctx.input_dtype = layer, x.dtype
        sign = y if layer.relu and residual is not None else None
        save(ctx, operand, weight, norm_weight, norm_bias, z, sign, statistics)
        return y, x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor | None, added: Tensor | None) -> tuple[Tensor | None, ...]:
        if gradient is None:
            return (added, *[None] * 7)
        layer: Layer = ctx.layer
        x, weight, norm_weight, norm_bias, z, sign, statistics = saved(ctx)
        with no_autocast("cpu"):
            gradient = as_map(gradient, z.dtype)
            dz = torch.empty_like(z)
            masks_residual = ctx.needs_input_grad[5] and layer.relu
            for_residual = torch.empty_like(z) if masks_residual else gradient if ctx.needs_input_grad[5] else None
            for_norm = torch.empty_like(statistics)
            samples, channels, height, width = z.shape
            extension().batch_norm_backward(
                _addresses(
                    (
                        gradient,
                        sign,
                        z,
                        for_residual if masks_residual else None,
                        dz,
                        norm_weight,
                        norm_bias,
                        *statistics,
                        *for_norm,
                    )
                ),
                _CODES[z.dtype],
                samples * height * width,
                channels,
                layer.relu,
                torch.get_num_threads(),
            )
            for_x, for_weight = _convolution_gradients(
                layer, x, dz, weight, added, ctx.needs_input_grad[0], ctx.needs_input_grad[1]
            )
        if for_x is not None:
            for_x = for_x.to(ctx.input_dtype)
        # The norm takes off again whatever the convolution's bias adds.
        for_bias = for_norm.new_zeros(channels) if ctx.needs_input_grad[2] else None
        return for_x, for_weight, for_bias, for_norm[0], for_norm[1], for_residual, None, None


def _addresses(tensors: tuple[Tensor | None, ...]) -> tuple[int, ...]:
    return tuple(0 if tensor is None else tensor.data_ptr() for tensor in tensors)


def _cast(weight: Tensor, dtype: torch.dtype) -> Tensor:
    return cast_weight(weight, dtype) if weight.shape[2:] == (3, 3) else as_map(weight, dtype)


def _convolution_gradients(
    layer: Layer, x: Tensor, dz: Tensor, weight: Tensor, added: Tensor | None, need_x: bool, need_weight: bool
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of a convolution's input, ``added`` included, and of its weight, as autograd wants them."""
    if layer.is_plain_3x3 and direct.takes(dz.dtype, *weight.shape[:2]):
        added = None if added is None else as_map(added, dz.dtype)
        return gradients(x, dz, weight, need_input=need_x, need_weight=need_weight, added=added)
    stride, padding, dilation = layer.geometry
    for_x, for_weight, _ = torch.ops.aten.convolution_backward(
        dz,
        x,
        _cast(weight, x.dtype),
        None,
        stride,
        padding,
        dilation,
        False,
        [0, 0],
        1,
        [need_x, need_weight, False],
    )
    if need_x and added is not None:
        for_x = for_x.add_(added)
    return for_x if need_x else None, for_weight.to(weight.dtype) if need_weight else None
