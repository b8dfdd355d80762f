"""The loss's launches: forward and backward over like strides, samples in registers and in two passes."""

from collections.abc import Iterator

import torch
from torch import Tensor

from bench.machine_code.compiling import Launch, recorded
from bench.machine_code.shipped import ShippedLaunch
from ftfast.kernels import ft_loss

FACTORS = [
    # shape, dtype, p
    ((2, 256, 7, 7), torch.bfloat16, 1),
    ((2, 256, 7, 7), torch.float16, 1),
    ((2, 256, 7, 7), torch.float32, 2),
    ((2, 32, 8, 8), torch.bfloat16, 2),
    ((2, 1024, 7, 7), torch.float32, 1),
]


def run_launchers(student: Tensor, teacher: Tensor, *, p: int = 1, weight: float | Tensor = 1.0) -> None:
    """Forward and backward; the teacher gets its gradient too where it can have one."""
    loss, statistics = ft_loss.ft_loss_forward(student, teacher, p=p, reduction="mean", eps=1e-12, weight=weight)
    ft_loss.ft_loss_backward(
        student,
        teacher,
        statistics,
        loss,
        p=p,
        reduction="mean",
        weight=weight,
        student_gradient=True,
        teacher_gradient=teacher.is_floating_point() and teacher.element_size() > 1,
    )


def launches_of(shape: tuple[int, ...], dtype: torch.dtype, p: int) -> list[Launch]:
    """Forward's launch and backward's."""
    with recorded(ft_loss) as launches:
        run_launchers(torch.empty(shape, dtype=dtype), torch.empty(shape, dtype=dtype), p=p)
    return launches


def shipped_launches() -> Iterator[ShippedLaunch]:
    """What :data:`FACTORS` launch."""
    for shape, dtype, p in FACTORS:
        forward, backward = launches_of(shape, dtype, p)
        factors = f"{'x'.join(map(str, shape))} {str(dtype).removeprefix('torch.')} p={p}"
        yield ShippedLaunch(f"forward {factors}", forward)
        yield ShippedLaunch(f"backward {factors}", backward)
