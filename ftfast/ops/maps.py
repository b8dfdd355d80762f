"""Feature maps as the kernels take them: the dtype that torch would convolve them in, and channels_last."""

from collections.abc import Iterator
from contextlib import contextmanager

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


@contextmanager
def no_autocast(device_type: str) -> Iterator[None]:
    """Keeps autocast out; backward may be called under another one than forward."""
    if has_autocast(device_type) and torch.is_autocast_enabled(device_type):
        torch.set_autocast_enabled(device_type, False)  # autocast's own context costs more than a launch
        try:
            yield
        finally:
            torch.set_autocast_enabled(device_type, True)
    else:
        yield


def as_map(features: Tensor, dtype: torch.dtype) -> Tensor:
    """Features in the compute dtype and channels_last; the same tensor where they are so already."""
    return plain(features).to(dtype).contiguous(memory_format=torch.channels_last)
