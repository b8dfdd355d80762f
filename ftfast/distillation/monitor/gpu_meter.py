"""A GPU's load, memory, power and energy through nvidia-ml-py.

Without a GPU, without nvidia-ml-py or after an error of NVML there are no figures, and no failure.
"""

from typing import Any

import torch

# Of a PCI address, with their hexadecimal digits.
PCI_PARTS = (("domain", 8), ("bus", 2), ("device", 2))


class Gpu:
    """A GPU as NVML knows it; every method returns None for what NVML does not tell."""

    def __init__(self, nvml: Any, handle: Any) -> None:
        self.nvml = nvml
        self._handle = handle

    def ask(self, function: str, *arguments: str) -> Any:
        """``nvml.<function>(handle, *arguments)``, constants by their names, or None."""
        try:
            constants = [getattr(self.nvml, name) for name in arguments]
            return getattr(self.nvml, function)(self._handle, *constants)
        except (self.nvml.NVMLError, AttributeError):
            # An older driver or binding, or a GPU without the sensor.
            return None

    def joules(self) -> float | None:
        """The energy counter."""
        millijoules = self.ask("nvmlDeviceGetTotalEnergyConsumption")
        return None if millijoules is None else millijoules / 1000

    def watts(self) -> float | None:
        """The power drawn now."""
        milliwatts = self.ask("nvmlDeviceGetPowerUsage")
        return None if milliwatts is None else milliwatts / 1000

    def busy_percent(self) -> int | None:
        """Of a sample's time."""
        use = self.ask("nvmlDeviceGetUtilizationRates")
        return None if use is None else use.gpu

    def memory_used(self) -> int | None:
        """Bytes in use, of all processes."""
        memory = self.ask("nvmlDeviceGetMemoryInfo")
        return None if memory is None else int(memory.used)


def why_there_is_none(device: torch.device) -> str | None:
    """Why :func:`gpu_of` has no figures of a device, in a sentence; None on a CPU, which has none."""
    if device.type != "cuda":
        return None
    try:
        import pynvml  # noqa: F401
    except ImportError:
        return (
            "telemetry has no load, memory, power and energy of the GPU, since nvidia-ml-py is missing; "
            "pip install 'ftfast[distill]' brings it"
        )
    return "telemetry has no load, memory, power and energy of the GPU, which NVML does not find"


def gpu_of(device: torch.device) -> Gpu | None:
    """NVML's view of a torch device, or None.

    Found by UUID, else by its place on the PCI bus: NVML counts devices without regard to CUDA_VISIBLE_DEVICES.
    """
    if device.type != "cuda":
        return None
    try:
        import pynvml
    except ImportError:
        return None
    properties = torch.cuda.get_device_properties(device)
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    place = ":".join(f"{getattr(properties, f'pci_{part}_id', 0):0{width}x}" for part, width in PCI_PARTS)
    for function, name in (
        (pynvml.nvmlDeviceGetHandleByUUID, f"GPU-{getattr(properties, 'uuid', '')}"),
        (pynvml.nvmlDeviceGetHandleByPciBusId, f"{place}.0"),
    ):
        try:
            return Gpu(pynvml, function(name))
        except pynvml.NVMLError:
            continue
    return None
