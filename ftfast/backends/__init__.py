"""What a backend of the loss is. Each has a file of its own here and one line in ``ftfast.dispatch.BACKENDS``."""

from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Support(NamedTuple):
    """Whether a backend can run here, and the reason in words, which is shown to users."""

    ok: bool
    reason: str


class Options(NamedTuple):
    """What a call asks for besides its tensors; ``weight`` is a float, or a 0-d tensor without gradient."""

    p: int
    reduction: str
    eps: float
    weight: float | Tensor


class Written(NamedTuple):
    """What a forward pass wrote: ``gradient`` has the bits of a backward pass that is given ``upstream``."""

    loss: Tensor
    statistics: Tensor
    gradient: Tensor
    upstream: float


class Backend:
    """A way to compute the loss.

    Attributes:
        name: what ``backend=`` and FTFAST_BACKEND call it.
        automatic_on: the device types on which "auto" takes it; on others it runs when asked for.
    """

    name: str
    automatic_on: tuple[str, ...] = ()

    def supports(self, device: torch.device, student_dtype: torch.dtype, teacher_dtype: torch.dtype) -> Support:
        """Whether it computes factors of these dtypes on this device: what will run in one line, or why not."""
        raise NotImplementedError


class KernelBackend(Backend):
    """A backend with kernels of its own: the loss and its gradients without autograd.

    Attributes:
        device_types: those that its kernels are written for.
        expects_upstream: its forward pass may write the gradient for the upstream gradient of the steps before.
    """

    device_types: tuple[str, ...] = ()
    expects_upstream = False

    def launchers(self, device: torch.device) -> ModuleType:
        """The module whose ``ft_loss_forward`` and ``ft_loss_backward`` launch the kernels for a device."""
        raise NotImplementedError

    def forward(self, student: Tensor, teacher: Tensor, options: Options) -> tuple[Tensor, Tensor]:
        """``(loss, statistics)`` of factors that were checked and are not empty.

        Returns:
            The loss as :func:`ftfast.ft_loss` gives it, and what backward needs beside the factors, ``[5, N]``; both
            float64 where a factor is, else float32.
        """
        p, reduction, eps, weight = options
        launch = self.launchers(student.device).ft_loss_forward
        return launch(student, teacher, p=p, reduction=reduction, eps=eps, weight=weight)

    def backward(
        self,
        student: Tensor,
        teacher: Tensor,
        statistics: Tensor,
        upstream: Tensor,
        options: Options,
        needed: tuple[bool, bool],
    ) -> tuple[Tensor | None, Tensor | None]:
        """The gradients that are needed, in their factor's dtype and strides; upstream is 0-d or ``[N]``."""
        given: dict[str, Any] = {"p": options.p, "reduction": options.reduction, "weight": options.weight}
        given |= {"student_gradient": needed[0], "teacher_gradient": needed[1]}
        return self.launchers(student.device).ft_loss_backward(student, teacher, statistics, upstream, **given)

    def forward_with_gradient(self, student: Tensor, teacher: Tensor, options: Options) -> Written | None:
        """What :meth:`forward` returns, and the student's gradient; None where forward had better leave that."""
        return None

    def head_kernels(self, device: torch.device) -> ModuleType | None:
        """The module that computes whole heads on a device, as ftfast.ops.ft_head.native does; None without one."""
        return None

    def place(self, device: torch.device) -> str:
        """What runs the kernels, in a word."""
        return device.type

    def environment_to_run(self, device: torch.device) -> dict[str, str]:
        """What another process needs in its environment to run the kernels here; empty where nothing helps."""
        return {}
