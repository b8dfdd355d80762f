"""Tiles of the 3x3 convolution's kernels by dtype, channels and how a device reads the maps.

None of these spills, and each one's shared memory fits its devices, with Triton 3.6 and 3.9.
"""

from functools import cache
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from .map_descriptors import can_describe
from .pack_weights import padded_channels

# What the tables are kept by. Compute capabilities 9.0 and 10.0 copy tiles by tensor descriptors. Every other device
# has the tiles of 8.0, which fit the 99 KiB of shared memory that the smallest of them have. Maps whose rows do not
# start at multiples of 16 bytes have tiles of their own on all devices: masks and addresses take more registers there.
HOPPER, BLACKWELL, AMPERE, ODD = 90, 100, 80, 0


# An estimate of what storing a partial weight gradient and adding it up costs, in steps over pixels.
PARTIAL_STEPS = 6


class ConvolutionTile(NamedTuple):
    """Pixels, columns and channels of a tile of the forward convolution or the input gradient; warps; stages."""

    pixels: int
    columns: int
    channels: int
    warps: int
    stages: int


class WeightTile(NamedTuple):
    """Rows (channels of x) and columns (of dz) of a tile of the weight gradient, pixels a step; warps; stages."""

    rows: int
    columns: int
    pixels: int
    warps: int
    stages: int


# By device and bytes of a number; the largest first.
_FORWARD = {
    (HOPPER, 2): [
        ConvolutionTile(128, 256, 64, 8, 3),
        ConvolutionTile(128, 128, 64, 8, 4),
        ConvolutionTile(128, 64, 64, 4, 4),
        ConvolutionTile(64, 64, 64, 4, 4),
        ConvolutionTile(128, 32, 64, 4, 4),
        ConvolutionTile(64, 32, 64, 4, 4),
        ConvolutionTile(64, 16, 64, 4, 4),
    ],
    (HOPPER, 4): [
        ConvolutionTile(128, 128, 32, 8, 3),
        ConvolutionTile(128, 64, 32, 4, 3),
        ConvolutionTile(64, 64, 32, 4, 3),
        ConvolutionTile(128, 32, 32, 4, 3),
        ConvolutionTile(64, 32, 32, 4, 3),
        ConvolutionTile(64, 16, 32, 4, 3),
    ],
    (AMPERE, 2): [
        ConvolutionTile(128, 128, 32, 8, 4),
        ConvolutionTile(128, 64, 32, 4, 4),
        ConvolutionTile(64, 64, 32, 4, 4),
        ConvolutionTile(128, 32, 32, 4, 4),
        ConvolutionTile(64, 32, 32, 4, 4),
        ConvolutionTile(64, 16, 32, 4, 4),
    ],
    (AMPERE, 4): [
        ConvolutionTile(128, 64, 32, 8, 3),
        ConvolutionTile(64, 64, 32, 4, 3),
        ConvolutionTile(128, 32, 32, 4, 3),
        ConvolutionTile(64, 32, 32, 4, 3),
        ConvolutionTile(64, 16, 32, 4, 3),
    ],
    (ODD, 2): [
        ConvolutionTile(64, 32, 32, 4, 3),
        ConvolutionTile(64, 16, 32, 4, 3),
    ],
    (ODD, 4): [
        ConvolutionTile(64, 32, 16, 4, 3),
        ConvolutionTile(64, 16, 16, 4, 3),
    ],
}
_FORWARD |= {(BLACKWELL, size): _FORWARD[HOPPER, size] for size in (2, 4)}
# On 10.0 the longer epilogue of four warps spills now and then.
_INPUT_GRADIENT = _FORWARD | {
    (BLACKWELL, size): [tile._replace(warps=8) for tile in _FORWARD[HOPPER, size]] for size in (2, 4)
}
# With Triton 3.6 it does so with three stages.
_INPUT_GRADIENT[ODD, 2] = [tile._replace(stages=4) for tile in _FORWARD[ODD, 2]]
CONVOLUTION_TILES = {"forward": _FORWARD, "input gradient": _INPUT_GRADIENT}

WEIGHT_TILES = {
    (HOPPER, 2): [
        WeightTile(128, 256, 64, 8, 3),
        WeightTile(128, 128, 64, 8, 4),
        WeightTile(128, 64, 64, 4, 4),
        WeightTile(64, 64, 64, 4, 4),
        WeightTile(64, 32, 64, 4, 4),
        WeightTile(32, 32, 64, 4, 4),
        WeightTile(64, 16, 64, 4, 4),
        WeightTile(16, 16, 64, 4, 4),
    ],
    (HOPPER, 4): [
        WeightTile(128, 128, 32, 8, 3),
        WeightTile(64, 64, 32, 4, 3),
        WeightTile(64, 32, 32, 4, 3),
        WeightTile(32, 32, 32, 4, 3),
        WeightTile(16, 16, 32, 4, 3),
    ],
    (AMPERE, 2): [
        WeightTile(128, 128, 32, 8, 4),
        WeightTile(64, 64, 32, 4, 4),
        WeightTile(64, 32, 32, 4, 4),
        WeightTile(32, 32, 64, 4, 3),
        WeightTile(16, 16, 32, 4, 4),
    ],
    (AMPERE, 4): [
        WeightTile(128, 64, 32, 8, 3),
        WeightTile(64, 64, 32, 4, 3),
        WeightTile(64, 32, 32, 4, 3),
        WeightTile(32, 32, 32, 4, 3),
        WeightTile(16, 16, 32, 4, 3),
    ],
    (ODD, 2): [
        WeightTile(64, 64, 32, 8, 3),
        WeightTile(64, 32, 32, 4, 3),
        WeightTile(32, 32, 32, 4, 3),
        WeightTile(16, 16, 32, 4, 3),
    ],
    (ODD, 4): [
        WeightTile(64, 64, 16, 8, 3),
        WeightTile(64, 32, 16, 4, 3),
        WeightTile(32, 32, 16, 4, 3),
        WeightTile(16, 16, 16, 4, 3),
    ],
}
WEIGHT_TILES |= {(BLACKWELL, size): WEIGHT_TILES[HOPPER, size] for size in (2, 4)}


@cache
def _device(device: torch.device) -> tuple[int, int]:
    if device.type != "cuda":
        return HOPPER, 132
    properties = torch.cuda.get_device_properties(device)
    known = {(9, 0): HOPPER, (10, 0): BLACKWELL}
    return known.get((properties.major, properties.minor), AMPERE), properties.multi_processor_count


def capability(device: torch.device) -> int:
    """HOPPER, BLACKWELL or AMPERE; the CPU, for Triton's interpreter, counts as the first."""
    return _device(device)[0]


def multiprocessors(device: torch.device) -> int:
    """How many programs run at once when each fills a multiprocessor."""
    return _device(device)[1]


def table(*maps: Tensor) -> int:
    """Which of the tables a kernel over these contiguous maps takes."""
    return capability(maps[0].device) if can_describe(*maps) else ODD


def copied_by(table: int) -> int:
    """The compute capability for whose tensor descriptors the tiles are; 0 where they are copied by pointers."""
    return table if table in (HOPPER, BLACKWELL) else 0


def _fits(count: int, tile: int) -> bool:
    """Whether tiles of this size overhang by a quarter at most."""
    return 4 * triton.cdiv(count, tile) * tile <= 5 * count


def convolution_tile(
    operation: str, table: int, dtype: torch.dtype, channels_in: int, channels_out: int, pixels: int, programs: int
) -> ConvolutionTile:
    """The largest tile of "forward" or "input gradient" that makes at least ``programs`` of them, else the smallest.

    Channels are counted as the product does: channels_in is what it sums over.
    """
    padded_in, padded_out = padded_channels(channels_in), padded_channels(channels_out)
    tiles = CONVOLUTION_TILES[operation][table, dtype.itemsize]
    tiles = [tile for tile in tiles if _fits(padded_out, tile.columns)]
    # Where the widest tiles are too few narrower ones do, down to 64 columns.
    tiles = [tile for tile in tiles if tile.columns >= min(tiles[0].columns, 64)]
    for tile in tiles:
        if triton.cdiv(pixels, tile.pixels) * triton.cdiv(padded_out, tile.columns) >= programs:
            break
    return tile._replace(channels=min(tile.channels, padded_in))


def weight_tile(table: int, dtype: torch.dtype, channels: int, columns: int) -> WeightTile:
    """The largest tile of the weight gradient ``[columns, channels, 3, 3]`` that fits."""
    rows, columns = padded_channels(channels), padded_channels(columns)
    tiles = WEIGHT_TILES[table, dtype.itemsize]
    return next(tile for tile in tiles if _fits(rows, tile.rows) and _fits(columns, tile.columns))


def splits(tiles: int, steps: int, programs: int) -> int:
    """In how many pieces to cut the steps over the pixels of so many tiles, where ``programs`` run at once."""

    def duration(pieces: int) -> int:
        return triton.cdiv(tiles * pieces, programs) * (triton.cdiv(steps, pieces) + PARTIAL_STEPS)

    most = max(1, min(2 * programs // tiles, steps))
    return min(range(1, most + 1), key=duration)
