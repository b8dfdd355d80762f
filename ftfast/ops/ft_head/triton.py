"""The head on a GPU: a small one in a single pass, others layer by layer round the library's convolutions.

Maps go to the kernels as ``[N, H, W, C]``, which is a view of a channels_last tensor.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ftfast.kernels.device import current_stream, device_guard
from ftfast.kernels.ft_head.ft_head_small_plan import Frozen, SmallHeadPlan
from ftfast.kernels.ft_head.ft_head_small_shape import HeadShape, small_head_fits
from ftfast.kernels.ft_head.pack_weights import Packing
from ftfast.kernels.layout import Layout
from ftfast.ops.ft_head import layers as ft_head_layers
from ftfast.ops.ft_head.layers import like_parameter
from ftfast.ops.ft_head.operands import Head, Kept
from ftfast.ops.ft_head.stack import Stack, prepare_once
from ftfast.ops.kernel_table import Work, choose_kernel
from ftfast.ops.maps import as_map, rounds_to_tf32
from ftfast.ops.remembered import Remembered

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


_plans: Remembered[tuple[Any, ...], SmallHeadPlan] = Remembered()


def _packed(weights: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """Memory with the weights packed forward."""
    layout, device = Layout(), weights[0].device
    packing = Packing(weights, dtype, layout)
    memory = layout.empty(device)
    with device_guard(device):
        packing(weights, memory, memory, current_stream(device))
    return memory


def _frozen(stack: Stack, held: int | None, dtype: torch.dtype) -> Frozen:
    """The frozen paraphraser's side; where it is not held, to be packed in this call."""

    def prepare() -> Frozen:
        weights, biases = zip(*stack.folded(), strict=True)
        return Frozen(() if is_held else weights, _float32(biases), _packed(weights, dtype) if is_held else None)

    is_held = held is not None
    frozen: Frozen = prepare_once(stack, held, ("triton", dtype), prepare) if is_held else prepare()
    return frozen


def _float32(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [tensor if tensor.dtype == torch.float32 else tensor.float() for tensor in tensors]


def _plan(student: Tensor, teacher: Tensor, frozen: Frozen | None, head: Head, keep: bool) -> SmallHeadPlan:
    """Of features in the compute dtype; ``teacher`` is the teacher's factor where that is given, without ``frozen``."""
    translator, options = head.translator, head.options
    p, reduction, eps, weight = options
    slopes = translator.negative_slope, head.paraphraser.negative_slope if head.paraphraser else 1.0
    of_weight = weight.dtype if isinstance(weight, Tensor) and weight.device == student.device else None
    sizes = (student.shape, student.dtype, student.device, teacher.shape[1], teacher.dtype, frozen is None)
    packed = translator.weights if frozen is None else (*translator.weights, *frozen.weights)
    kinds = [part for each in packed for part in (each.shape, each.stride(), each.dtype)]
    key = (*sizes, p, reduction, eps, of_weight, *slopes, keep, *kinds)
    plan = _plans.get(key)
    if plan is None:
        samples, channels, height, width = student.shape
        factor = translator.weights[2].shape[0]
        teacher_channels = None if frozen is None else teacher.shape[1]
        shape = HeadShape(student.device, student.dtype, samples, height, width, channels, teacher_channels, factor)
        weighted = of_weight is not None
        plan = SmallHeadPlan(
            shape,
            translator.weights,
            () if frozen is None else frozen.weights,
            p=p,
            reduction=reduction,
            eps=eps,
            slopes=slopes,
            weighted=weighted,
            keeps=keep,
        )
        _plans.keep(key, plan)
    return plan


def ft_head_forward(
    student: Tensor, teacher: Tensor | None, teacher_factor: Tensor | None, head: Head, *, keep: bool
) -> tuple[Tensor, Kept]:
    """The loss, and what backward needs; nothing unless ``keep``."""
    if head.plan.kernel == LAYERS:
        return ft_head_layers.ft_head_forward(student, teacher, teacher_factor, head, keep=keep)
    dtype, translator = head.plan.dtype, head.translator
    maps = as_map(student, dtype)
    if teacher_factor is None:
        assert teacher is not None
        assert head.paraphraser is not None
        known, frozen = as_map(teacher, dtype), _frozen(head.paraphraser, head.held, dtype)
    else:
        known, frozen = teacher_factor.contiguous(memory_format=torch.channels_last), None
    plan = _plan(maps, known, frozen, head, keep)
    biases = _float32(translator.biases)
    loss, kept = plan.forward(maps, known, translator.weights, biases, frozen, head.options.weight)
    return loss, Kept((student, kept), plan) if keep else Kept()


def ft_head_backward(kept: Kept, upstream: Tensor, head: Head, needed: tuple[bool, ...]) -> list[Tensor | None]:
    """Gradients of the student's features and of ``(weight, bias, weight, ...)``; None for what is not needed."""
    if head.plan.kernel == LAYERS:
        return ft_head_layers.ft_head_backward(kept, upstream, head, needed)
    student, memory = kept.tensors
    plan: SmallHeadPlan = kept.plan
    maps, translator = as_map(student, head.plan.dtype), head.translator
    weights = translator.weights
    for_student, for_weights, for_biases = plan.backward(
        maps, memory, upstream, weights, head.options.weight, needs_input=needed[0]
    )
    gradients: list[Tensor | None] = [for_student]
    for weight, bias, for_weight, for_bias in zip(weights, translator.biases, for_weights, for_biases, strict=True):
        gradients += (
            for_weight if plan.like_parameters else like_parameter(for_weight, weight),
            like_parameter(for_bias, bias),
        )
    return [gradient if need else None for gradient, need in zip(gradients, needed, strict=True)]
