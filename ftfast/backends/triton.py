"""Triton kernels for GPUs, which are compiled at their first launch."""

import importlib.util
import os
from functools import cache
from types import MappingProxyType, ModuleType

import torch

from ftfast.backends import KernelBackend, Support


@cache
def interpreting() -> bool:
    """Whether Triton runs its kernels in its interpreter, on the CPU."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")  # as Triton reads it


class Triton(KernelBackend):
    """``ftfast.kernels``; nothing of Triton is imported before a launch."""

    name = "triton"
    automatic_on = ("cuda",)
    device_types = ("cuda",)
    modules = MappingProxyType({"attention": "ftfast.kernels.attention", "crop_resize": "ftfast.kernels.crop_resize"})

    def supports(self, device: torch.device, student_dtype: torch.dtype, teacher_dtype: torch.dtype) -> Support:
        if importlib.util.find_spec("triton") is None:
            return Support(False, "the package triton is not installed")
        if device.type == "cpu":
            if interpreting():
                return Support(True, "Triton's interpreter (TRITON_INTERPRET=1), for tests: slow")
            return Support(False, "Triton compiles for GPUs, and these tensors are on the CPU")
        if device.type != "cuda":
            return Support(False, f"its kernels are written for CUDA devices, and these tensors are on {device.type}")
        capability = torch.cuda.get_device_capability(device)
        if capability < (8, 0):
            return Support(False, f"its kernels need compute capability 8.0, and this device has {capability}")
        if teacher_dtype == torch.float8_e4m3fn and capability < (8, 9):
            return Support(False, f"float8_e4m3fn needs compute capability 8.9, and this device has {capability}")
        return Support(True, "Triton kernels")

    def launchers(self, device: torch.device) -> ModuleType:
        from ftfast.kernels import ft_loss

        return ft_loss

    def head_kernels(self, device: torch.device) -> ModuleType | None:
        from ftfast.ops.ft_head import triton as ft_head_triton

        return ft_head_triton

    def place(self, device: torch.device) -> str:
        return "interpreter" if device.type == "cpu" else device.type

    def environment_to_run(self, device: torch.device) -> dict[str, str]:
        """Triton reads TRITON_INTERPRET when a kernel is decorated: too late for this process."""
        if device.type != "cpu" or interpreting() or importlib.util.find_spec("triton") is None:
            return {}
        return {"TRITON_INTERPRET": "1"}
