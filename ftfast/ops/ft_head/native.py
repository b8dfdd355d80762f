"""The head on the CPU: convolutions with their activations, and the native loss.

Nothing is kept for backward but the three inputs of the translator's convolutions, the gradient at its end, and the
weights as they were computed with.
"""

from typing import Any

import torch
from torch import Tensor

from ftfast.ops.conv3x3 import native as conv3x3
from ftfast.ops.conv3x3.direct import PackedWeight
from ftfast.ops.ft_head.operands import SEPARATE, Head, Kept
from ftfast.ops.ft_head.stack import Stack, prepare_once
from ftfast.ops.ft_loss import native as ft_loss
from ftfast.ops.ft_loss.plans import loss_plan
from ftfast.ops.maps import as_map

LAYERS = "layers"


def candidates(
    device: torch.device,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    factor_channels: int,
    teacher_channels: int | None,
) -> tuple[str, ...]:
    """The ways that can compute a head of this student map ``[N, C, H, W]``."""
    return (LAYERS,) if dtype in (torch.float32, torch.bfloat16) else ()


def choose(
    device: torch.device,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    factor_channels: int,
    teacher_channels: int | None,
) -> tuple[str, str]:
    """The way to compute a head of this student map, and why."""
    if not candidates(device, dtype, shape, factor_channels, teacher_channels):
        return SEPARATE, f"oneDNN trains in float32 and bfloat16, and these maps are {dtype}"
    return LAYERS, "oneDNN's convolutions, everything between them in place"


def _frozen_layers(
    stack: Stack, held: int | None, dtype: torch.dtype, x: Tensor
) -> list[tuple[Tensor | PackedWeight, Tensor]]:
    samples, _, height, width = x.shape

    def prepare() -> list[tuple[Tensor | PackedWeight, Tensor]]:
        return [
            (conv3x3.freeze_weight(weight, dtype, samples, height, width), bias.float())
            for weight, bias in stack.folded()
        ]

    # Not for each size of maps: weights reordered for one are as fast with another, and sizes may change every step.
    return prepare_once(stack, held, ("native", dtype), prepare)


def teacher_factor_of(teacher: Tensor, paraphraser: Stack, held: int | None, dtype: torch.dtype) -> Tensor:
    """The frozen paraphraser's factor, channels_last in the compute dtype."""
    x = as_map(teacher, dtype)
    for weight, bias in _frozen_layers(paraphraser, held, dtype, x):
        x = conv3x3.forward(x, weight, bias, paraphraser.negative_slope)
    return x


def ft_head_forward(
    student: Tensor, teacher: Tensor | None, teacher_factor: Tensor | None, head: Head, *, keep: bool
) -> tuple[Tensor, Kept]:
    """The loss, and what backward needs: the convolutions' inputs (the student's features as they came), the gradient
    of the last result before its activation for an upstream gradient of 1, and the parameters, since to cast the
    weights again costs less than to keep them cast. Nothing is kept unless ``keep``.
    """
    dtype, translator = head.plan.dtype, head.translator
    if teacher_factor is None:
        assert teacher is not None
        assert head.paraphraser is not None
        teacher_factor = teacher_factor_of(teacher, head.paraphraser, head.held, dtype)
    maps = [as_map(student, dtype)]
    weights = [conv3x3.prepare_weight(weight, dtype) for weight in translator.weights]
    for weight, bias in zip(weights, translator.biases, strict=True):
        maps.append(conv3x3.forward(maps[-1], weight, bias, translator.negative_slope))
    student_factor = maps.pop()
    p, reduction, eps, loss_weight = head.options
    plan: Any = loss_plan(ft_loss, student_factor, teacher_factor, p, reduction, eps)
    if not keep:
        return plan.forward(student_factor, teacher_factor, loss_weight)[0], Kept()
    loss, gradient = plan.forward_with_gradient(student_factor, teacher_factor, loss_weight, 1.0)
    conv3x3.leaky_relu_backward_(gradient, student_factor, translator.negative_slope)
    return loss, Kept((student, *maps[1:], gradient, *translator.weights))


def ft_head_backward(kept: Kept, upstream: Tensor, head: Head, needed: tuple[bool, ...]) -> list[Tensor | None]:
    """Gradients of the student's features and of ``(weight, bias, weight, ...)``; None for what is not needed."""
    student, *between = kept.tensors
    maps, dz, weights = [as_map(student, head.plan.dtype), *between[:2]], between[2], between[3:]
    if upstream.dim():
        dz = (dz * upstream.view(-1, 1, 1, 1)).to(dz.dtype)
    elif (factor := upstream.item()) != 1:
        dz = dz * factor
    gradients: list[Tensor | None] = [None] * 7
    output: Tensor | None = None
    for layer in (2, 1, 0):
        weight_at, bias_at = 1 + 2 * layer, 2 + 2 * layer
        for_bias = conv3x3.leaky_relu_backward_(dz, output, head.translator.negative_slope)
        if needed[bias_at]:
            gradients[bias_at] = for_bias.to(head.translator.biases[layer].dtype)
        below = any(needed[:weight_at])
        for_input, gradients[weight_at] = conv3x3.gradients(
            maps[layer],
            dz,
            weights[layer],
            need_input=below,
            need_weight=needed[weight_at],
        )
        if for_input is None:
            return gradients
        dz, output = for_input, maps[layer]
    gradients[0] = dz
    return gradients
