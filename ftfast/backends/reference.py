"""Plain PyTorch, which autograd differentiates: what every other backend is held to, and falls back on."""

import torch

from ftfast.backends import Backend, Support


class Reference(Backend):
    """Runs everywhere; ``ftfast.reference`` has the formula."""

    name = "reference"

    def supports(self, device: torch.device, student_dtype: torch.dtype, teacher_dtype: torch.dtype) -> Support:
        return Support(True, "plain PyTorch, on any device")
