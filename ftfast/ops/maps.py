"""Feature maps as the kernels take them: the dtype that torch would convolve them in, and channels_last."""

import torch
from torch import Tensor

from ftfast.ops.memory import plain
from ftfast.reference import has_autocast


def autocasts(features: Tensor) -> bool:
    """Whether torch would convolve these features in autocast's dtype, here and now."""
    kind = features.device.type
    known = kind in ("cpu", "cuda") or has_autocast(kind)
    return known and features.dtype != torch.float64 and torch.is_autocast_enabled(kind)


def map_dtype(features: Tensor) -> torch.dtype:
    """The dtype that torch would convolve these features in, here and now."""
    return torch.get_autocast_dtype(features.device.type) if autocasts(features) else features.dtype


def rounds_to_tf32() -> bool:
    """Whether torch's convolutions of float32 may round their operands to TF32, by either of its two switches."""
    return bool(torch.backends.cudnn.conv.fp32_precision == "tf32")  # type: ignore[attr-defined]


class no_autocast:
    """Keeps autocast out; backward may be called under another one than forward.

    Autocast's own context costs more than a launch, and a generator's half of one.
    """

    def __init__(self, device_type: str) -> None:
        self._device_type = device_type
        self._is_on = has_autocast(device_type) and torch.is_autocast_enabled(device_type)

    def __enter__(self) -> None:
        if self._is_on:
            torch.set_autocast_enabled(self._device_type, False)

    def __exit__(self, *_: object) -> None:
        if self._is_on:
            torch.set_autocast_enabled(self._device_type, True)


def as_map(features: Tensor, dtype: torch.dtype) -> Tensor:
    """Features in the compute dtype and channels_last; the same tensor where they are so already."""
    features = plain(features)
    if features.dtype != dtype:
        features = features.to(dtype)
    return features.contiguous(memory_format=torch.channels_last)
