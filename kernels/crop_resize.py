"""Boxes of photographs of unlike size, resized with antialiasing, mirrored and normalised in one launch.

    s = box / grid            a = max(s, 1)           c_i = s * (first + i + 1/2)
    w_ik = max(0, 1 - |k + 1/2 - c_i| / a)            k over the box's pixels alone
    out[n, i, j, c] = gain_c * sum_kl w_ik w_jl pixel[c, k, l] / sum_kl w_ik w_jl + shift_c

along both sides, which is torch's and Pillow's triangle filter; a mirrored photograph has ``j`` counted from the right.
Photographs are uint8 ``[3, H, W]`` of any strides, within 2**31 bytes, each at an address of its own; ``table`` is
``[N, COLUMNS]`` int64, a row for each: address, strides of channels, rows and columns, the box's top, left, height and
width, the grid's height and width that the box is resized to, the first row and column of the grid that are wanted, and
whether they are mirrored. The result is ``[N, S, S, 3]``.

A program owns (part of) a row of one photograph. It reads the taps of its pixels straight from the photograph: there
are (2a + 1)^2 of them, and what neighbours share comes from the cache.
"""

# mypy: disallow-incomplete-defs=False
# (a kernel's parameters carry Triton's annotations, and only where Triton needs one)

import torch
import triton
import triton.language as tl
from torch import Tensor

from .device import device_guard
from .launch import ceil_div, power_of_2

COLUMNS = 13
LONGEST_BLOCK = 256
OPTIONS = {"num_warps": 4, "enable_fp_fusion": True}


@triton.jit
def _weight(distance, narrowing):
    return tl.maximum(1.0 - tl.abs(distance) * narrowing, 0.0)


@triton.jit
def _crop_resize_kernel(
    table,  # [N, COLUMNS]
    result,  # [N, S, S, 3]
    size,
    gain_red,
    gain_green,
    gain_blue,
    shift_red,
    shift_green,
    shift_blue,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The module's formula; the grid is photographs times rows, by blocks of a row."""
    n = (tl.program_id(0) // size).to(tl.int64)
    i = tl.program_id(0) % size
    j = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    entry = table + n * COLUMNS
    pixels = tl.load(entry).to(tl.pointer_type(tl.uint8))
    channel_stride = tl.load(entry + 1).to(tl.int32)
    row_stride = tl.load(entry + 2).to(tl.int32)
    column_stride = tl.load(entry + 3).to(tl.int32)
    corner = tl.load(entry + 4).to(tl.int32) * row_stride + tl.load(entry + 5).to(tl.int32) * column_stride
    box_height = tl.load(entry + 6).to(tl.int32)
    box_width = tl.load(entry + 7).to(tl.int32)
    scale_y = box_height.to(tl.float32) / tl.load(entry + 8).to(tl.float32)
    scale_x = box_width.to(tl.float32) / tl.load(entry + 9).to(tl.float32)
    first_row = tl.load(entry + 10).to(tl.int32)
    first_column = tl.load(entry + 11).to(tl.int32)
    is_mirrored = tl.load(entry + 12) != 0

    widening_y = tl.maximum(scale_y, 1.0)
    widening_x = tl.maximum(scale_x, 1.0)
    centre_y = scale_y * ((i + first_row).to(tl.float32) + 0.5)
    centre_x = scale_x * ((tl.where(is_mirrored, size - 1 - j, j) + first_column).to(tl.float32) + 0.5)
    first_y = tl.maximum(centre_y - widening_y + 0.5, 0.0).to(tl.int32)
    last_y = tl.minimum((centre_y + widening_y + 0.5).to(tl.int32), box_height)
    first_x = tl.maximum(centre_x - widening_x + 0.5, 0.0).to(tl.int32)
    last_x = tl.minimum((centre_x + widening_x + 0.5).to(tl.int32), box_width)
    taps = (2.0 * widening_x).to(tl.int32) + 2
    narrowing_y = 1.0 / widening_y
    narrowing_x = 1.0 / widening_x

    red = tl.zeros((BLOCK,), tl.float32)
    green = tl.zeros((BLOCK,), tl.float32)
    blue = tl.zeros((BLOCK,), tl.float32)
    weights = tl.zeros((BLOCK,), tl.float32)
    for y in range(first_y, last_y):
        weight_y = _weight(y + 0.5 - centre_y, narrowing_y)
        line = pixels + corner + y * row_stride
        for tap in range(0, taps):
            x = first_x + tap
            within = (x < last_x) & (j < size)
            weight = tl.where(within, weight_y * _weight(x.to(tl.float32) + 0.5 - centre_x, narrowing_x), 0.0)
            weights += weight
            place = line + x * column_stride
            red += weight * tl.load(place, mask=within, other=0).to(tl.float32)
            green += weight * tl.load(place + channel_stride, mask=within, other=0).to(tl.float32)
            blue += weight * tl.load(place + 2 * channel_stride, mask=within, other=0).to(tl.float32)

    share = 1.0 / tl.where(weights > 0.0, weights, 1.0)
    places = result + ((n * size + i) * size + j) * 3
    wanted = j < size
    tl.store(places, (red * share * gain_red + shift_red).to(result.dtype.element_ty), mask=wanted)
    tl.store(places + 1, (green * share * gain_green + shift_green).to(result.dtype.element_ty), mask=wanted)
    tl.store(places + 2, (blue * share * gain_blue + shift_blue).to(result.dtype.element_ty), mask=wanted)


def crop_resize(
    table: Tensor, size: int, gains: tuple[float, ...], shifts: tuple[float, ...], dtype: torch.dtype
) -> Tensor:
    """``[N, 3, size, size]`` channels_last in ``dtype``, of the photographs that the table's rows point at.

    Nothing is checked here: a wrong address or a box that reaches beyond its photograph is read as it stands.
    """
    result = torch.empty((len(table), size, size, 3), dtype=dtype, device=table.device)
    block = min(LONGEST_BLOCK, power_of_2(size))
    grid = (len(table) * size, ceil_div(size, block))
    with device_guard(table.device):
        _crop_resize_kernel[grid](table, result, size, *gains, *shifts, COLUMNS=COLUMNS, BLOCK=block, **OPTIONS)
    return result.permute(0, 3, 1, 2)
