"""The loss and its gradients on a backend with kernels of its own, without autograd."""

from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ftfast.ops import ft_loss_native


class Options(NamedTuple):
    """What a call asks for besides its tensors; ``weight`` is a float, or a 0-d tensor without gradient."""

    p: int
    reduction: str
    eps: float
    weight: float | Tensor


def launchers(backend: str, device: torch.device) -> ModuleType:
    """The module whose ``ft_loss_forward`` and ``ft_loss_backward`` run a backend on a device."""
    if backend == "native" and device.type == "cpu":
        return ft_loss_native
    if backend == "native":
        from ftfast.ops import ft_loss_cuda

        return ft_loss_cuda
    from ftfast.kernels import ft_loss as triton_kernels

    return triton_kernels


def forward(student: Tensor, teacher: Tensor, options: Options, backend: str) -> tuple[Tensor, Tensor]:
    """``(loss, statistics)``: statistics ``[5, N]`` are what backward needs beside the factors."""
    return launchers(backend, student.device).ft_loss_forward(student, teacher, **options._asdict())


def backward(
    student: Tensor,
    teacher: Tensor,
    statistics: Tensor,
    upstream: Tensor,
    options: Options,
    backend: str,
    needed: tuple[bool, bool],
) -> tuple[Tensor | None, Tensor | None]:
    given: dict[str, Any] = {"p": options.p, "reduction": options.reduction, "weight": options.weight}
    given |= {"student_gradient": needed[0], "teacher_gradient": needed[1]}
    return launchers(backend, student.device).ft_loss_backward(student, teacher, statistics, upstream, **given)
