"""C++ kernels on the CPU, and CUDA C++ on GPUs where nvcc was there at the build."""

from functools import cache
from types import MappingProxyType, ModuleType

import torch

from ftfast.backends import KernelBackend, Support
from ftfast.extension import build_report, extension, load_extension, why_no_tiles
from ftfast.ops.ft_loss import native as ft_loss_native


class Native(KernelBackend):
    """The extension ``ftfast._C``."""

    name = "native"
    automatic_on = ("cpu", "cuda")
    device_types = ("cpu", "cuda")
    expects_upstream = True
    modules = MappingProxyType({"attention": "ftfast.ops.attention.native", "conv3x3": "ftfast.ops.conv3x3.native"})

    def supports(self, device: torch.device, student_dtype: torch.dtype, teacher_dtype: torch.dtype) -> Support:
        if device.type not in self.device_types:
            return Support(False, f"its kernels are for CPUs and CUDA devices, and these tensors are on {device.type}")
        found, reason = load_extension()
        if found is None:
            return Support(False, reason)
        if device.type == "cuda":
            return _cuda_supports(found, device)
        instructions = f"{found.instruction_set()} instructions" + ("" if why_no_tiles() else " and matrix tiles")
        return Support(True, f"C++ kernels, {instructions}, {torch.get_num_threads()} threads")

    def launchers(self, device: torch.device) -> ModuleType:
        if device.type == "cpu":
            return ft_loss_native
        from ftfast.ops.ft_loss import cuda as ft_loss_cuda

        return ft_loss_cuda

    def head_kernels(self, device: torch.device) -> ModuleType | None:
        if device.type != "cpu":
            return None
        from ftfast.ops.ft_head import native as ft_head_native

        return ft_head_native

    def kernels(self, operation: str, device: torch.device) -> ModuleType | None:
        return super().kernels(operation, device) if device.type == "cpu" else None


def _cuda_supports(found: ModuleType, device: torch.device) -> Support:
    if not hasattr(found, "ft_loss_cuda_forward"):
        reason = build_report().get("without_cuda") or "it was built without nvcc"
        return Support(False, f"the extension has no kernels for GPUs: {reason}")
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        return Support(False, f"its CUDA kernels need compute capability 8.0, and this device has {capability}")
    if problem := _cuda_problem(torch.cuda.current_device() if device.index is None else device.index):
        return Support(False, f"its CUDA kernels do not run on this device: {problem}")
    return Support(True, "CUDA C++ kernels")


@cache
def _cuda_problem(index: int) -> str:
    with torch.cuda.device(index):
        return str(extension().ft_loss_cuda_problem(index))
