"""The head on a GPU layer by layer: each convolution on the kernel that was measured fastest, our epilogues between
them, and the gradient at the factor held at scale O(1).
"""

import torch
from torch import Tensor

from ftfast.kernels import activation
from ftfast.kernels.ft_head_loss import head_loss, scaled_direction
from ftfast.ops import conv3x3_triton as conv3x3
from ftfast.ops.convolution_stack import Stack, prepare_once
from ftfast.ops.ft_head_operands import Head
from ftfast.ops.ft_loss_launch import forward as loss_forward
from ftfast.ops.maps import as_map


def teacher_factor_of(teacher: Tensor, paraphraser: Stack, dtype: torch.dtype) -> Tensor:
    """The frozen paraphraser's factor, channels_last in the compute dtype."""
    x = as_map(teacher, dtype)

    def prepare() -> list[tuple[Tensor, Tensor]]:
        return [(conv3x3.cast_weight(weight, dtype), bias.float()) for weight, bias in paraphraser.folded()]

    for weight, bias in prepare_once(paraphraser, ("layers", dtype), prepare):
        x = conv3x3.layer(x, weight, bias, paraphraser.negative_slope)
    return x


def ft_head_forward(
    student: Tensor, teacher: Tensor | None, teacher_factor: Tensor | None, head: Head, *, keep: bool
) -> tuple[Tensor, list[Tensor]]:
    """The loss, and what backward needs; nothing unless ``keep``."""
    dtype, translator, options = head.plan.dtype, head.translator, head.options
    if teacher_factor is None:
        assert teacher is not None
        assert head.paraphraser is not None
        teacher_factor = teacher_factor_of(teacher, head.paraphraser, dtype)
    maps = [as_map(student, dtype)]
    for weight, bias in zip(translator.weights, translator.biases, strict=True):
        maps.append(conv3x3.layer(maps[-1], weight, bias, translator.negative_slope))
    student_factor = maps.pop()
    if not keep:
        return loss_forward(student_factor, teacher_factor, options, "triton")[0], []
    loss, direction, inverse_norm = head_loss(
        conv3x3.nhwc(student_factor),
        conv3x3.nhwc(teacher_factor),
        **options._asdict(),
        negative_slope=translator.negative_slope,
    )
    return loss, [student, *maps[1:], direction, inverse_norm, *translator.weights]


def ft_head_backward(kept: list[Tensor], upstream: Tensor, head: Head, needed: tuple[bool, ...]) -> list[Tensor | None]:
    """Gradients of the student's features and of ``(weight, bias, weight, ...)``; None for what is not needed."""
    slope, options = head.translator.negative_slope, head.options
    maps, weights = [as_map(kept[0], head.plan.dtype), *kept[1:3]], kept[5:]
    gradient, partials, scale = scaled_direction(
        kept[3], kept[4], upstream, p=options.p, reduction=options.reduction, weight=options.weight
    )
    dz = conv3x3.nchw(gradient)
    gradients: list[Tensor | None] = [None] * 7
    for layer in (2, 1, 0):
        weight_at, bias_at = 1 + 2 * layer, 2 + 2 * layer
        if needed[bias_at]:
            gradients[bias_at] = activation.sum_partials(partials, scale).to(head.translator.biases[layer].dtype)
        below = any(needed[:weight_at])
        _, gradients[weight_at] = conv3x3.gradients(
            maps[layer], dz, weights[layer], need_input=False, need_weight=needed[weight_at], scale=scale
        )
        if not below:
            return gradients
        for_input, _ = conv3x3.gradients(
            maps[layer], dz, weights[layer], need_weight=False, scale=scale if layer == 0 else None
        )
        assert for_input is not None
        if layer == 0:
            gradients[0] = for_input
            return gradients
        dz = for_input
        partials = activation.leaky_relu_backward_(conv3x3.nhwc(dz), conv3x3.nhwc(maps[layer]), slope)
    return gradients
