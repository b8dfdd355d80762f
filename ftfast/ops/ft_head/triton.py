"""The head on a GPU: a small one in a single pass, others layer by layer round the library's convolutions.

Maps go to the kernels as ``[N, H, W, C]``, which is a view of a channels_last tensor.
"""

import torch
from torch import Tensor

from ftfast.kernels.ft_head import ft_head_small, ft_head_small_backward
from ftfast.kernels.ft_head.ft_head_small_shape import small_head_fits
from ftfast.kernels.ft_head.pack_weights import PackedWeight, pack_weights
from ftfast.ops.ft_head import layers as ft_head_layers
from ftfast.ops.ft_head.layers import like_parameter, nhwc
from ftfast.ops.ft_head.operands import Head
from ftfast.ops.ft_head.stack import Stack, prepare_once
from ftfast.ops.kernel_table import Work, choose_kernel
from ftfast.ops.maps import rounds_to_tf32

SINGLE_PASS, LAYERS = "single pass", "layers"
# The widest head that takes a single pass unmeasured.
NARROW = 128


def candidates(
    device: torch.device,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    factor_channels: int,
    teacher_channels: int | None,
) -> tuple[str, ...]:
    """The ways that can compute a head of this student map ``[N, C, H, W]``."""
    misfit = _misfit(device, dtype, shape, factor_channels, teacher_channels)
    return (LAYERS,) if misfit else (SINGLE_PASS, LAYERS)


def _misfit(
    device: torch.device,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    factor_channels: int,
    teacher_channels: int | None,
) -> str:
    _, student_channels, height, width = shape
    return small_head_fits(device, dtype, height, width, teacher_channels, student_channels, factor_channels)


def choose(
    device: torch.device,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    factor_channels: int,
    teacher_channels: int | None,
) -> tuple[str, str]:
    """The way to compute a head of this student map, and why."""
    samples, student_channels, height, width = shape
    if dtype == torch.float32 and device.type == "cuda" and not rounds_to_tf32():
        return LAYERS, "TF32 is off (torch.backends.cudnn), and IEEE float32 is the library's"
    misfit = _misfit(device, dtype, shape, factor_channels, teacher_channels)
    name = str(dtype).removeprefix("torch.")
    work = Work("head", name, samples, height, width, student_channels, factor_channels)
    ways = candidates(device, dtype, shape, factor_channels, teacher_channels)
    # Every program reads all weights: past these sizes they come from the L2 cache more often than pays.
    narrow = max(student_channels, teacher_channels or 0, factor_channels) <= NARROW
    kernel, reason = choose_kernel(work, device, ways, SINGLE_PASS if narrow and not misfit else LAYERS)
    return kernel, f"{reason}; not in a single pass: {misfit}" if misfit else reason


def _frozen(stack: Stack | None, held: int | None, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    """Packed weights and float32 biases of the frozen paraphraser; empty lists without one."""
    if stack is None:
        return [], []

    def prepare() -> tuple[list[Tensor], list[Tensor]]:
        folded = stack.folded()
        packed = pack_weights([weight for weight, _ in folded], dtype, backward=False)
        return [weight.forward for weight in packed], [bias.float() for _, bias in folded]

    return prepare_once(stack, held, ("triton", dtype), prepare)


def ft_head_forward(
    student: Tensor, teacher: Tensor | None, teacher_factor: Tensor | None, head: Head, *, keep: bool
) -> tuple[Tensor, list[Tensor]]:
    """The loss, and what backward needs, the student's features first; nothing unless ``keep``."""
    if head.plan.kernel == LAYERS:
        return ft_head_layers.ft_head_forward(student, teacher, teacher_factor, head, keep=keep)
    dtype, translator = head.plan.dtype, head.translator
    packed: list[PackedWeight] = pack_weights(translator.weights, dtype, backward=keep)
    teacher_weights, teacher_biases = _frozen(head.paraphraser if teacher_factor is None else None, head.held, dtype)
    if teacher_factor is not None:
        teacher_factor = nhwc(teacher_factor)
    loss, kept = ft_head_small.small_head_forward(
        nhwc(student.to(dtype)),
        None if teacher is None else nhwc(teacher.to(dtype)),
        teacher_factor,
        [weight.forward for weight in packed],
        [bias.float() for bias in translator.biases],
        teacher_weights,
        teacher_biases,
        **head.options._asdict(),
        student_slope=translator.negative_slope,
        teacher_slope=head.paraphraser.negative_slope if head.paraphraser else 1.0,
    )
    if not keep:
        return loss, []
    backward_weights = [weight.backward for weight in packed if weight.backward is not None]
    return loss, [student, *kept, *backward_weights]


def ft_head_backward(kept: list[Tensor], upstream: Tensor, head: Head, needed: tuple[bool, ...]) -> list[Tensor | None]:
    """Gradients of the student's features and of ``(weight, bias, weight, ...)``; None for what is not needed."""
    if head.plan.kernel == LAYERS:
        return ft_head_layers.ft_head_backward(kept, upstream, head, needed)
    student, *between = kept
    options, translator = head.options, head.translator
    for_student, for_weights, for_biases = ft_head_small_backward.small_head_backward(
        nhwc(student.to(head.plan.dtype)),
        ft_head_small.Kept(*between[:-3]),
        between[-3:],
        upstream,
        p=options.p,
        reduction=options.reduction,
        weight=options.weight,
        negative_slope=translator.negative_slope,
        need_student_gradient=needed[0],
    )
    gradients: list[Tensor | None] = [None if for_student is None else for_student.permute(0, 3, 1, 2)]
    for weight, bias, for_weight, for_bias in zip(
        translator.weights, translator.biases, for_weights, for_biases, strict=True
    ):
        gradients += [like_parameter(for_weight, weight), like_parameter(for_bias, bias)]
    return [gradient if need else None for gradient, need in zip(gradients, needed, strict=True)]
