"""How a program of the single-pass head is shaped, and which heads are too large for one program an image and side."""

from typing import NamedTuple

import torch
import triton

from ftfast.kernels.device import capability
from ftfast.kernels.launch import power_of_2

from .pack_weights import padded_channels

OLD_TRITON = tuple(int(part) for part in triton.__version__.split(".")[:2]) < (3, 9)
# What one program can hold of an image without a spill: pixels, numbers of 16 bits of a map and of a factor.
MOST_PIXELS = 64
MOST_MAP = 64 * 256
MOST_FACTOR = 64 * 128


class HeadShape(NamedTuple):
    """Sizes of a head: maps are ``[samples, height, width, channels]`` in ``dtype``; no teacher where its factor is
    known.
    """

    device: torch.device
    dtype: torch.dtype
    samples: int
    height: int
    width: int
    student: int
    teacher: int | None
    factor: int

    @property
    def pixels(self) -> int:
        return self.height * self.width

    def map(self, channels: int) -> tuple[int, int, int, int]:
        """The shape of a map of so many channels."""
        return self.samples, self.height, self.width, channels


def small_head_fits(
    device: torch.device,
    dtype: torch.dtype,
    height: int,
    width: int,
    teacher_channels: int | None,
    student_channels: int,
    factor_channels: int,
) -> str:
    """Why a head is too large for one program an image, or "" where it fits."""
    if height * width > MOST_PIXELS:
        return f"maps of {height}x{width} have more than {MOST_PIXELS} pixels"
    units = rows_for(height * width) * (dtype.itemsize // 2)
    if padded_channels(factor_channels) * units > MOST_FACTOR:
        return f"a factor of {factor_channels} channels on {height}x{width} is too large for one program"
    sides = (("teacher", teacher_channels or 1), ("student", student_channels), ("factor", factor_channels))
    for side, channels in sides:
        # A block's sizes are powers of two.
        if channels > 64 and power_of_2(channels) != padded_channels(channels):
            return f"the {side}'s {channels} channels are neither up to 64 nor a power of two"
        if padded_channels(channels) * units > MOST_MAP:
            return f"the {side}'s {channels} channels on {height}x{width} are too many for one program"
    if OLD_TRITON and capability(device) == 100:
        return f"Triton {triton.__version__} does not compile it for this device, 3.9 does"
    return ""


def warps_for(*channels: int) -> int:
    """Warps of a program whose widest product has so many columns."""
    return 4 if max(padded_channels(count) for count in channels) <= 64 else 8


def stages_for(device: torch.device, *channels: int) -> int:
    """Stages of a program's products; older versions of Triton spill with three where registers are few."""
    few = capability(device) == 80 or max(channels) >= 512
    return 2 if OLD_TRITON and few else 3


def rows_for(pixels: int) -> int:
    """Rows of an image's tile: tensor cores want 16 at least."""
    return max(16, power_of_2(pixels))
