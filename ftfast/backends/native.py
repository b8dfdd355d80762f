"""C++ kernels on the CPU, and CUDA C++ on GPUs where nvcc was there at the build."""

import importlib.util
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from ftfast.backends import KernelBackend, Options, Support, Written
from ftfast.extension import build_report, extension, load_extension
from ftfast.ops.ft_loss import native as ft_loss_native
from ftfast.ops.ft_loss.expected_upstream import expected_upstream, note_upstream


class Native(KernelBackend):
    """The extension ``ftfast._C``."""

    name = "native"
    automatic_on = ("cpu",)
    device_types = ("cpu", "cuda")
    expects_upstream = True

    def supports(self, device: torch.device, student_dtype: torch.dtype, teacher_dtype: torch.dtype) -> Support:
        if device.type not in self.device_types:
            return Support(False, f"its kernels are for CPUs and CUDA devices, and these tensors are on {device.type}")
        found, reason = load_extension()
        if found is None:
            return Support(False, reason)
        if device.type == "cuda":
            return _cuda_supports(found, device)
        return Support(True, f"C++ kernels, {found.instruction_set()} instructions, {torch.get_num_threads()} threads")

    def launchers(self, device: torch.device) -> ModuleType:
        if device.type == "cpu":
            return ft_loss_native
        from ftfast.ops.ft_loss import cuda as ft_loss_cuda

        return ft_loss_cuda

    def forward_with_gradient(self, student: Tensor, teacher: Tensor, options: Options) -> Written | None:
        """On the CPU: the factors are still in cache there, which spares reading them a second time."""
        if student.device.type != "cpu" or (upstream := expected_upstream(student, options)) is None:
            return None
        return Written(*ft_loss_native.ft_loss_forward_with_gradient(student, teacher, *options, upstream), upstream)

    def backward(
        self,
        student: Tensor,
        teacher: Tensor,
        statistics: Tensor,
        upstream: Tensor,
        options: Options,
        needed: tuple[bool, bool],
    ) -> tuple[Tensor | None, Tensor | None]:
        """As every backend's; on the CPU the next forward pass expects this upstream gradient."""
        if student.device.type == "cpu":
            note_upstream(student, upstream, options)
        return super().backward(student, teacher, statistics, upstream, options, needed)

    def head_kernels(self, device: torch.device) -> ModuleType | None:
        if device.type != "cpu":
            return None
        from ftfast.ops.ft_head import native as ft_head_native

        return ft_head_native


def _cuda_supports(found: ModuleType, device: torch.device) -> Support:
    if not hasattr(found, "ft_loss_cuda_forward"):
        reason = build_report().get("without_cuda") or "it was built without nvcc"
        return Support(False, f"the extension has no kernels for GPUs: {reason}")
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        return Support(False, f"its CUDA kernels need compute capability 8.0, and this device has {capability}")
    if importlib.util.find_spec("triton") is None:
        return Support(False, "its counters are those of the Triton launches, and the package triton is not installed")
    if problem := _cuda_problem(torch.cuda.current_device() if device.index is None else device.index):
        return Support(False, f"its CUDA kernels do not run on this device: {problem}")
    return Support(True, "CUDA C++ kernels")


@cache
def _cuda_problem(index: int) -> str:
    with torch.cuda.device(index):
        return str(extension().ft_loss_cuda_problem(index))
