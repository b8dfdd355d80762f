"""The loss and its gradients on a backend with kernels of its own, without autograd."""

from typing import Any, NamedTuple

from torch import Tensor

from ftfast.ops import ft_loss_native as native


class Options(NamedTuple):
    """What a call asks for besides its tensors; ``weight`` is a float, or a 0-d tensor without gradient."""

    p: int
    reduction: str
    eps: float
    weight: float | Tensor


def forward(student: Tensor, teacher: Tensor, options: Options, backend: str) -> tuple[Tensor, Tensor]:
    """``(loss, statistics)``: statistics ``[5, N]`` are what backward needs beside the factors."""
    if backend == "native":
        return native.ft_loss_forward(student, teacher, **options._asdict())
    from ftfast.kernels import ft_loss as triton_kernels

    return triton_kernels.ft_loss_forward(student, teacher, **options._asdict())


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
    if backend == "native":
        return native.ft_loss_backward(student, teacher, statistics, upstream, **given)
    from ftfast.kernels import ft_loss as triton_kernels

    return triton_kernels.ft_loss_backward(student, teacher, statistics, upstream, **given)
