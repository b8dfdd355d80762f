"""The head on a GPU layer by layer: the library's convolutions, our epilogues between them, and the gradient at the
factor held at scale O(1).

Maps are channels_last ``[N, C, H, W]``; the kernels get them as ``[N, H, W, C]``.
"""

from functools import lru_cache
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ftfast.backends import KernelBackend
from ftfast.dispatch import BACKENDS, supports
from ftfast.kernels import activation
from ftfast.kernels.ft_head.copy_weights import cast_weights, scaled_like
from ftfast.kernels.ft_head.ft_head_loss import scaled_direction
from ftfast.ops.ft_head.operands import Head, Kept
from ftfast.ops.ft_head.stack import Stack, prepare_once
from ftfast.ops.ft_loss.plans import loss_plan
from ftfast.ops.maps import as_map


def nhwc(tensor: Tensor) -> Tensor:
    """The kernels' view of a map."""
    return tensor.contiguous(memory_format=torch.channels_last).permute(0, 2, 3, 1)


def like_parameter(gradient: Tensor, parameter: Tensor) -> Tensor:
    """The gradient with the parameter's dtype and layout, so that autograd keeps it without a copy."""
    if gradient.dtype == parameter.dtype and gradient.stride() == parameter.stride():
        return gradient
    return torch.empty_like(parameter).copy_(gradient)


def _layer(x: Tensor, weight: Tensor, bias: Tensor, negative_slope: float) -> Tensor:
    """``leaky_relu(conv(x))``; the weight cast already."""
    y = F.conv2d(x, weight, padding=1).contiguous(memory_format=torch.channels_last)
    activation.bias_leaky_relu_(nhwc(y), bias.float(), negative_slope)
    return y


def teacher_factor_of(teacher: Tensor, paraphraser: Stack, held: int | None, dtype: torch.dtype) -> Tensor:
    """The frozen paraphraser's factor, channels_last in the compute dtype."""
    x = as_map(teacher, dtype)

    def prepare() -> list[tuple[Tensor, Tensor]]:
        folded = paraphraser.folded()
        weights = cast_weights([weight for weight, _ in folded], dtype)
        return [(weight, bias.float()) for weight, (_, bias) in zip(weights, folded, strict=True)]

    for weight, bias in prepare_once(paraphraser, held, ("layers", dtype), prepare):
        x = _layer(x, weight, bias, paraphraser.negative_slope)
    return x


def ft_head_forward(
    student: Tensor, teacher: Tensor | None, teacher_factor: Tensor | None, head: Head, *, keep: bool
) -> tuple[Tensor, Kept]:
    """The loss, and what backward needs; nothing unless ``keep``."""
    dtype, translator = head.plan.dtype, head.translator
    if teacher_factor is None:
        assert teacher is not None
        assert head.paraphraser is not None
        teacher_factor = teacher_factor_of(teacher, head.paraphraser, head.held, dtype)
    maps, weights = [as_map(student, dtype)], cast_weights(translator.weights, dtype)
    for weight, bias in zip(weights, translator.biases, strict=True):
        maps.append(_layer(maps[-1], weight, bias, translator.negative_slope))
    student_factor = maps.pop()
    teacher_factor = teacher_factor.contiguous(memory_format=torch.channels_last)
    p, reduction, eps, weight_of_loss = head.options
    launchers = _loss_launchers(student_factor.device, student_factor.dtype, teacher_factor.dtype)
    plan = loss_plan(launchers, student_factor, teacher_factor, p, reduction, eps)
    loss, statistics = plan.forward(student_factor, teacher_factor, weight_of_loss)
    if not keep:
        return loss, Kept()
    if teacher_factor.is_inference():  # which autograd does not save
        teacher_factor = teacher_factor.clone()
    return loss, Kept((student, *maps[1:], student_factor, teacher_factor, statistics, *weights))


def loss_backend(device: torch.device, student_dtype: torch.dtype, teacher_dtype: torch.dtype) -> KernelBackend:
    """What computes the loss at a head's end: CUDA C++ where it was built, which reads a sample of any size once."""
    native = device.type == "cuda" and supports("native", device, student_dtype, teacher_dtype).ok
    found = BACKENDS["native" if native else "triton"]
    assert isinstance(found, KernelBackend)
    return found


@lru_cache(maxsize=64)
def _loss_launchers(device: torch.device, student_dtype: torch.dtype, teacher_dtype: torch.dtype) -> ModuleType:
    return loss_backend(device, student_dtype, teacher_dtype).launchers(device)


def ft_head_backward(kept: Kept, upstream: Tensor, head: Head, needed: tuple[bool, ...]) -> list[Tensor | None]:
    """Gradients of the student's features and of ``(weight, bias, weight, ...)``; None for what is not needed."""
    slope, options = head.translator.negative_slope, head.options
    student, *between = kept.tensors
    maps, weights = [as_map(student, head.plan.dtype), *between[:2]], between[5:]
    gradient, partials, scale = scaled_direction(
        nhwc(between[2]),
        nhwc(between[3]),
        between[4],
        upstream,
        p=options.p,
        reduction=options.reduction,
        weight=options.weight,
        negative_slope=slope,
    )
    dz = gradient.permute(0, 3, 1, 2)
    for_input: Any = None
    for_weights: dict[int, Tensor] = {}
    bias_partials: dict[int, Tensor] = {}
    for layer in (2, 1, 0):
        weight_at, bias_at = 1 + 2 * layer, 2 + 2 * layer
        if needed[bias_at]:
            bias_partials[layer] = partials
        mask = [any(needed[:weight_at]), needed[weight_at], False]
        if any(mask):
            for_input, for_weights[layer], _ = torch.ops.aten.convolution_backward(
                dz, maps[layer], weights[layer], None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1, mask
            )
        if not mask[0]:
            break
        if layer:
            dz = for_input.contiguous(memory_format=torch.channels_last)
            partials = activation.leaky_relu_backward_(nhwc(dz), nhwc(maps[layer]), slope)
    gradients: list[Tensor | None] = [None] * 7
    if needed[0]:
        gradients[0] = for_input.mul_(scale)
    layers = [layer for layer in for_weights if needed[1 + 2 * layer]]
    parameters = [head.translator.weights[layer] for layer in layers]
    scaled = scaled_like([for_weights[layer] for layer in layers], parameters, scale)
    for layer, found in zip(layers, scaled, strict=True):
        gradients[1 + 2 * layer] = found
    totals = activation.sum_partials(list(bias_partials.values()), scale) if bias_partials else []
    for layer, total in zip(bias_partials, totals, strict=True):
        gradients[2 + 2 * layer] = total.to(head.translator.biases[layer].dtype)
    return gradients
