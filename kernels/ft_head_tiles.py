"""Tiles of the grouped head's kernels: two convolutions in one grid take more registers and shared memory than one.

None of these spills, and each one's shared memory fits its devices, with Triton 3.6 and 3.9.
"""

import heapq
from functools import cache
from typing import NamedTuple

import torch
import triton

from .conv3x3_tiles import AMPERE, BLACKWELL, HOPPER, ODD, ConvolutionTile
from .pack_weights import padded_channels


class WeightPiece(NamedTuple):
    """Rows (channels of x), columns (of dz) and pixels a step of a weight gradient's tile."""

    rows: int
    columns: int
    pixels: int


class BackwardTile(NamedTuple):
    """What the two kinds of programs of a backward grid take; warps and stages are the convolution's."""

    convolution: ConvolutionTile
    weight: WeightPiece


# By device and bytes of a number; the largest first. For two sides' convolutions in one grid.
FORWARD_TILES = {
    (HOPPER, 2): [
        ConvolutionTile(128, 256, 64, 8, 2),
        ConvolutionTile(128, 128, 64, 8, 4),
        ConvolutionTile(128, 64, 64, 4, 4),
        ConvolutionTile(64, 64, 64, 4, 4),
        ConvolutionTile(64, 32, 64, 4, 4),
        ConvolutionTile(64, 16, 64, 4, 4),
    ],
    (HOPPER, 4): [
        ConvolutionTile(128, 128, 32, 8, 3),
        ConvolutionTile(64, 64, 32, 4, 3),
        ConvolutionTile(64, 32, 32, 4, 3),
        ConvolutionTile(64, 16, 32, 4, 3),
    ],
    (AMPERE, 2): [
        ConvolutionTile(128, 128, 32, 8, 4),
        ConvolutionTile(64, 64, 32, 4, 4),
        ConvolutionTile(64, 32, 32, 4, 4),
        ConvolutionTile(64, 16, 32, 4, 4),
    ],
    (AMPERE, 4): [
        ConvolutionTile(128, 64, 32, 8, 3),
        ConvolutionTile(64, 64, 32, 4, 3),
        ConvolutionTile(64, 32, 32, 4, 3),
        ConvolutionTile(64, 16, 32, 4, 3),
    ],
    (ODD, 2): [ConvolutionTile(64, 32, 32, 4, 3), ConvolutionTile(64, 16, 32, 4, 3)],
    (ODD, 4): [ConvolutionTile(64, 32, 16, 4, 3), ConvolutionTile(64, 16, 16, 4, 3)],
}
# For an input gradient in one grid with a weight gradient, for which WEIGHT_PIECES has tiles of as many warps.
BACKWARD_TILES = {
    **FORWARD_TILES,
    (HOPPER, 2): [
        ConvolutionTile(128, 256, 64, 8, 3),
        ConvolutionTile(128, 128, 64, 8, 3),
        ConvolutionTile(128, 64, 64, 4, 4),
        ConvolutionTile(64, 64, 64, 4, 4),
        ConvolutionTile(64, 32, 64, 4, 4),
        ConvolutionTile(64, 16, 64, 4, 4),
    ],
    (ODD, 4): [ConvolutionTile(64, 32, 16, 4, 4), ConvolutionTile(64, 16, 16, 4, 4)],
}
# By device, bytes of a number and warps; the largest first.
WEIGHT_PIECES = {
    (HOPPER, 2, 8): [WeightPiece(128, 256, 64), WeightPiece(128, 128, 64), WeightPiece(64, 64, 64)],
    (HOPPER, 4, 8): [WeightPiece(128, 128, 32), WeightPiece(64, 64, 32)],
    (AMPERE, 2, 8): [WeightPiece(128, 128, 32), WeightPiece(64, 64, 32)],
    (AMPERE, 4, 8): [WeightPiece(128, 64, 32), WeightPiece(64, 64, 32)],
}
_PIXELS = {(HOPPER, 2): 64, (HOPPER, 4): 32, (AMPERE, 2): 32, (AMPERE, 4): 32, (ODD, 2): 32, (ODD, 4): 16}
for (_table, _size), _pixels in _PIXELS.items():
    _sizes = [(64, 64), (64, 32), (32, 32), (16, 16)]
    WEIGHT_PIECES[_table, _size, 4] = [WeightPiece(rows, columns, _pixels) for rows, columns in _sizes]
for _size in (2, 4):
    FORWARD_TILES[BLACKWELL, _size] = FORWARD_TILES[HOPPER, _size]
    for _warps in (4, 8):
        WEIGHT_PIECES[BLACKWELL, _size, _warps] = WEIGHT_PIECES[HOPPER, _size, _warps]
# What would spill as it is on the others.
BACKWARD_TILES[BLACKWELL, 2] = [tile for tile in BACKWARD_TILES[HOPPER, 2] if tile[:2] != (128, 64)]
BACKWARD_TILES[BLACKWELL, 4] = [
    tile._replace(warps=8 if tile.columns >= 64 else 4) for tile in BACKWARD_TILES[HOPPER, 4]
]
WEIGHT_PIECES[BLACKWELL, 4, 8] = [WeightPiece(128, 128, 32), *WEIGHT_PIECES[HOPPER, 4, 4]]
WEIGHT_PIECES[BLACKWELL, 4, 4] = [piece._replace(pixels=64) for piece in WEIGHT_PIECES[HOPPER, 4, 4]]
WEIGHT_PIECES[AMPERE, 2, 4][2] = WeightPiece(32, 32, 64)
# Partial weight gradients are written and read once more: at most so many bytes of them for a layer, or one set.
MOST_PARTIAL_BYTES = 20 * 2**20


def _fits(count: int, tile: int) -> bool:
    """Whether tiles of this size overhang by a quarter at most."""
    return 4 * triton.cdiv(count, tile) * tile <= 5 * count


def _largest(
    tiles: list[ConvolutionTile], columns: tuple[int, ...], pixels: int, multiprocessors: int
) -> ConvolutionTile:
    """The largest tile that fits the columns of every side and leaves no multiprocessor idle, else the smallest."""
    tiles = [tile for tile in tiles if all(_fits(each, tile.columns) for each in columns)]
    # Where the widest tiles are too few narrower ones do, down to 64 columns.
    tiles = [tile for tile in tiles if tile.columns >= min(tiles[0].columns, 64)]
    for tile in tiles:
        across = sum(triton.cdiv(each, tile.columns) for each in columns)
        if triton.cdiv(pixels, tile.pixels) * across >= multiprocessors:
            break
    return tile


@cache
def forward_tile(
    table: int, dtype: torch.dtype, channels_out: tuple[int, ...], pixels: int, multiprocessors: int
) -> ConvolutionTile:
    """The tile for convolutions to these channels in one grid."""
    columns = tuple(padded_channels(each) for each in channels_out)
    return _largest(FORWARD_TILES[table, dtype.itemsize], columns, pixels, multiprocessors)


@cache
def backward_tile(
    table: int, dtype: torch.dtype, channels: int, columns: int, pixels: int, multiprocessors: int
) -> BackwardTile:
    """The tiles for the gradients of a convolution from ``channels`` to ``columns``."""
    rows, columns = padded_channels(channels), padded_channels(columns)
    convolution = _largest(BACKWARD_TILES[table, dtype.itemsize], (rows,), pixels, multiprocessors)
    pieces = WEIGHT_PIECES[table, dtype.itemsize, convolution.warps]
    fitting = (piece for piece in pieces if _fits(rows, piece.rows) and _fits(columns, piece.columns))
    return BackwardTile(convolution, next(fitting, pieces[-1]))


@cache
def weight_splits(
    tiles: int, work: float, bytes_of_a_split: int, other_programs: int, other_work: float, multiprocessors: int
) -> int:
    """In how many pieces to cut the pixels of ``tiles`` weight tiles so that their grid is done first.

    Args:
        tiles, work: the weight tiles, and what one costs whole.
        bytes_of_a_split: of its partial sums.
        other_programs, other_work: what else is in the grid, behind the pieces, and what each of it costs.
        multiprocessors: how many programs run at once.
    """

    def end(splits: int) -> float:
        busy = [0.0] * multiprocessors
        for cost in [work / splits] * (tiles * splits) + [other_work] * other_programs:
            heapq.heapreplace(busy, busy[0] + cost)
        return max(busy)

    most = max(1, min(MOST_PARTIAL_BYTES // bytes_of_a_split, 2 * multiprocessors // tiles))
    return min(range(1, most + 1), key=end)
