"""The launches of a head in a single pass: the paper's CIFAR pairs."""

from collections.abc import Iterator

import torch

from bench.machine_code.compiling import ARCHITECTURES, Launch, recorded, replaced
from bench.machine_code.shipped import ShippedLaunch
from ftfast.kernels.ft_head import (
    ft_head_small,
    ft_head_small_backward,
    ft_head_small_shape,
    ft_head_small_weights,
    pack_weights,
)
from ftfast.kernels.ft_head.ft_head_small_plan import Frozen, SmallHeadPlan
from ftfast.kernels.ft_head.ft_head_small_shape import HeadShape

# The student's channels, the teacher's, the factor's, side of the map, dtype
HEADS = [
    (64, 64, 32, 8, torch.bfloat16),
    (64, 64, 32, 8, torch.float16),
    (64, 64, 32, 8, torch.float32),
    (64, 64, 64, 8, torch.bfloat16),
    (128, 128, 64, 8, torch.bfloat16),
    (128, 128, 64, 8, torch.float32),
    (64, 256, 64, 8, torch.bfloat16),
    (256, 256, 128, 8, torch.bfloat16),
    (512, 512, 256, 4, torch.bfloat16),
    (24, 24, 12, 7, torch.bfloat16),
]
SAMPLES = 4


def launches_of(
    student: int, teacher: int, factor: int, side: int, dtype: torch.dtype, p: int = 1, architecture: int = 90
) -> list[Launch]:
    """Forward's launch and backward's two."""
    with replaced(ft_head_small_shape, capability=lambda device: architecture):
        return _launches_of(student, teacher, factor, side, dtype, p)


def _launches_of(student: int, teacher: int, factor: int, side: int, dtype: torch.dtype, p: int) -> list[Launch]:
    def maps(channels: int) -> torch.Tensor:
        return torch.empty((SAMPLES, side, side, channels), dtype=dtype)

    def layers(channels: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        pairs = ((channels, channels), (channels, factor), (factor, factor))
        weights = [torch.empty(b, a, 3, 3).to(memory_format=torch.channels_last) for a, b in pairs]
        return weights, [torch.empty(b) for _, b in pairs]

    shape = HeadShape(torch.device("cpu"), dtype, SAMPLES, side, side, student, teacher, factor)
    weights, biases = layers(student)
    frozen = Frozen(*layers(teacher))
    with (
        recorded(pack_weights),
        recorded(ft_head_small) as forward,
        recorded(ft_head_small_backward) as inputs,
        recorded(ft_head_small_weights) as weight_gradients,
    ):
        plan = SmallHeadPlan(
            shape,
            weights,
            frozen.weights,
            p=p,
            reduction="mean",
            eps=1e-12,
            slopes=(0.1, 0.1),
            weighted=False,
            keeps=True,
        )
        loss, kept = plan.forward(maps(student), maps(teacher), weights, biases, frozen, 1.0)
        plan.backward(maps(student), kept, loss, weights, 1.0, needs_input=True)
    return [*forward, *inputs, *weight_gradients]


def refusal(head: tuple[int, int, int, int, torch.dtype], architecture: int) -> str:
    """Why the head is not shipped for an architecture with this Triton, or ""."""
    student, teacher, factor, side, dtype = head
    with replaced(ft_head_small_shape, capability=lambda device: architecture):
        return ft_head_small_shape.small_head_fits(torch.device("cpu"), dtype, side, side, teacher, student, factor)


def shipped_launches() -> Iterator[ShippedLaunch]:
    """What :data:`HEADS` launch."""
    names = ("forward", "input gradients", "weight gradients")
    for head in HEADS:
        student, teacher, factor, side, dtype = head
        title = f"{student}+{teacher}:{factor}x{side}x{side} {str(dtype).removeprefix('torch.')}"
        for architecture in ARCHITECTURES:
            if not refusal(head, architecture):
                launches = launches_of(*head, architecture=architecture)
                for name, launch in zip(names, launches, strict=True):
                    yield ShippedLaunch(f"{name} {title}", launch, (architecture,), tensor_cores=True)
