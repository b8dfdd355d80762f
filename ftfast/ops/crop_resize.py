"""A batch of photographs of unlike size, cut, resized, mirrored and normalised by one launch."""

from collections.abc import Sequence
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from ftfast.dispatch import kernels_for
from ftfast.ops.memory import plain

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LARGEST = 2**31 - 1  # bytes that a photograph spans, which the kernel counts in 32 bits


class Window(NamedTuple):
    """What becomes of one photograph: a box of it is resized to a grid, and a square of the grid is the result.

    Attributes:
        top, left, height, width: the box, in pixels of the photograph; it lies within it, and nothing outside it is
            seen.
        grid_height, grid_width: what the box is resized to, with torch's antialiased bilinear filter.
        first_row, first_column: where the square begins in the grid, within which it lies.
        flip: whether the square is mirrored.
    """

    top: int
    left: int
    height: int
    width: int
    grid_height: int
    grid_width: int
    first_row: int
    first_column: int
    flip: bool


def can_crop(device: torch.device) -> bool:
    """Whether :func:`crop_resize` runs on a device."""
    return _kernels(device) is not None


def _kernels(device: torch.device) -> ModuleType | None:
    return kernels_for("crop_resize", device, torch.float32, unasked=True)


def crop_resize(
    photographs: Sequence[Tensor],
    windows: Sequence[Window],
    size: int,
    *,
    mean: Sequence[float] = (0.0, 0.0, 0.0),
    deviation: Sequence[float] = (1.0, 1.0, 1.0),
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """``(square / 255 - mean) / deviation`` of every photograph, not rounded to whole levels in between.

    The current stream has to have the photographs; they may be let go of at once.

    Args:
        photographs: N of ``[3, H, W]`` uint8, any strides, on one device, each with a size of its own.
        windows: one for each.
        size: the squares' side in pixels.
        mean, deviation: of the three channels, of pixels from 0 to 1.
        dtype: float32, bfloat16 or float16.

    Returns:
        ``[N, 3, size, size]``, channels_last.

    Raises:
        TypeError: photographs that are no uint8, or another dtype of the result.
        ValueError: other shapes, too large ones, unlike devices, or a window beyond its photograph or grid.
        RuntimeError: a device that no backend has a kernel for.
    """
    _check(photographs, windows, size, dtype)
    if not photographs:
        return torch.empty((0, 3, size, size), dtype=dtype).contiguous(memory_format=torch.channels_last)
    device = photographs[0].device
    if (kernels := _kernels(device)) is None:
        raise RuntimeError(f"crop_resize has no kernel on {device}; ftfast info tells why each backend does not run.")
    photographs = [plain(photograph) for photograph in photographs]  # copies live until the launch
    rows = [
        (photograph.data_ptr(), *photograph.stride(), *(int(value) for value in window))
        for photograph, window in zip(photographs, windows, strict=True)
    ]
    table = torch.tensor(rows, dtype=torch.int64, device="cpu")
    if device.type == "cuda":
        table = table.pin_memory().to(device, non_blocking=True)
    gains = tuple(1 / (255 * value) for value in deviation)
    shifts = tuple(-centre / value for centre, value in zip(mean, deviation, strict=True))
    return kernels.crop_resize(table, size, gains, shifts, dtype)


def _check(photographs: Sequence[Tensor], windows: Sequence[Window], size: int, dtype: torch.dtype) -> None:
    if dtype not in DTYPES:
        raise TypeError(f"dtype is {dtype}; it takes float32, bfloat16 or float16.")
    if len(photographs) != len(windows):
        raise ValueError(f"windows has {len(windows)} for {len(photographs)} photographs; give one for each.")
    for place, (photograph, window) in enumerate(zip(photographs, windows, strict=True)):
        if photograph.dtype != torch.uint8:
            raise TypeError(f"photographs[{place}] is {photograph.dtype}; it takes uint8.")
        if photograph.dim() != 3 or len(photograph) != 3:
            raise ValueError(
                f"photographs[{place}] is {list(photograph.shape)}; it takes [3, H, W]: convert it to three channels."
            )
        span = sum((length - 1) * step for length, step in zip(photograph.shape, photograph.stride(), strict=True))
        if span > LARGEST:
            raise ValueError(f"photographs[{place}] spans {span} bytes; it takes at most {LARGEST}: make it smaller.")
        if photograph.device != photographs[0].device:
            raise ValueError(
                f"photographs[{place}] is on {photograph.device} and the first on {photographs[0].device}; "
                "put all on one device."
            )
        if not _lies_within(window, photograph.shape[1], photograph.shape[2], size):
            raise ValueError(
                f"windows[{place}] is {tuple(window)}, which reaches beyond its photograph of "
                f"{photograph.shape[1]}x{photograph.shape[2]} or its grid, of which {size}x{size} are wanted; cut it."
            )


def _lies_within(window: Window, height: int, width: int, size: int) -> bool:
    in_photograph = 0 <= window.top <= height - window.height and 0 <= window.left <= width - window.width
    in_grid = 0 <= window.first_row <= window.grid_height - size and 0 <= window.first_column <= (
        window.grid_width - size
    )
    return in_photograph and in_grid and min(window.height, window.width, size) >= 1
