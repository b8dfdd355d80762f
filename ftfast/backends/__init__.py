"""What a backend of the loss is. Each has a file of its own here and one line in ``ftfast.dispatch.BACKENDS``."""

from collections.abc import Mapping
from importlib import import_module
from types import MappingProxyType, ModuleType
from typing import NamedTuple, Protocol

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


class LossPlan(Protocol):
    """The loss of factors of one kind, and its gradients, without autograd: what does not change from call to call.

    A kind is the shape, both factors' strides and dtypes, the device, p, reduction and eps. The factors were checked
    and are not empty. The weight is a float or a 0-d tensor.

    Attributes:
        p, reduction, eps: as it was made for.
        expected_upstream: the upstream gradient for which forward had better write the student's gradient, where that
            alone is needed; None where it had better not. With it the plan also has
            ``forward_with_gradient(student, teacher, weight, upstream)``, ``(loss, gradient)``.
        layouts: dtype, shape and strides of both factors; :func:`ftfast.ops.ft_loss.plans.loss_plan` sets it.
    """

    p: int
    reduction: str
    eps: float
    layouts: tuple[tuple[torch.dtype, tuple[int, ...], tuple[int, ...]], ...]

    @property
    def expected_upstream(self) -> float | None: ...

    def forward(self, student: Tensor, teacher: Tensor, weight: float | Tensor) -> tuple[Tensor, Tensor]:
        """``(loss, statistics)``: the loss as :func:`ftfast.ft_loss` gives it, and what backward needs beside the
        factors, ``[5, N]``; both float64 where a factor is, else float32.
        """

    def backward(
        self,
        student: Tensor,
        teacher: Tensor,
        statistics: Tensor,
        upstream: Tensor,
        weight: float | Tensor,
        needed: tuple[bool, bool],
    ) -> tuple[Tensor | None, Tensor | None]:
        """The gradients that are needed, in their factor's dtype and strides; upstream is 0-d or ``[N]``."""


class KernelBackend(Backend):
    """A backend with kernels of its own: the loss and its gradients without autograd.

    Attributes:
        device_types: those that its kernels are written for.
        expects_upstream: its forward pass may write the gradient for the upstream gradient of the steps before.
        modules: what else it computes, and the module that does: ``"attention"`` as ftfast.ops.attention.native (whose
            ``attention_difference`` may be left out), ``"conv3x3"`` as ftfast.ops.conv3x3.native, ``"crop_resize"`` as
            ftfast.kernels.crop_resize.
    """

    device_types: tuple[str, ...] = ()
    expects_upstream = False
    modules: Mapping[str, str] = MappingProxyType({})

    def launchers(self, device: torch.device) -> ModuleType:
        """The module whose ``LossPlan(student, teacher, p, reduction, eps)`` launches the kernels for a device."""
        raise NotImplementedError

    def head_kernels(self, device: torch.device) -> ModuleType | None:
        """The module that computes whole heads on a device, as ftfast.ops.ft_head.native does; None without one."""
        return None

    def kernels(self, operation: str, device: torch.device) -> ModuleType | None:
        """The module of :attr:`modules` that computes on a device; None without one."""
        return import_module(self.modules[operation]) if operation in self.modules else None

    def place(self, device: torch.device) -> str:
        """What runs the kernels, in a word."""
        return device.type

    def environment_to_run(self, device: torch.device) -> dict[str, str]:
        """What another process needs in its environment to run the kernels here; empty where nothing helps."""
        return {}
