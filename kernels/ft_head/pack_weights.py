"""Weights of 3x3 convolutions, cast and laid out as the matrices that the single-pass head multiplies with.

With ``tap = 3 * ky + kx`` a weight ``[K, C, 3, 3]`` becomes

    forward  [9 * Cp, Kp]:  row tap * Cp + c, column k:  weight[k, c, ky, kx]
    backward [9 * Kp, Cp]:  row tap * Kp + k, column c:  weight[k, c, 2 - ky, 2 - kx]

where ``Cp`` and ``Kp`` are padded channel counts and the padding is zeros: kernels need no mask over its rows, and what
they read past a map's last channel meets no other tap's weights.
"""

# mypy: disallow-incomplete-defs=False
# (a kernel's parameters carry Triton's annotations, and only where Triton needs one)

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ftfast.kernels.launch import PlannedLaunch, ceil_div
from ftfast.kernels.layout import Layout, Piece, Place

TAPS = 9
TILE = 32
WEIGHTS_PER_LAUNCH = 3
OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}

_POINTERS = [f"{what}{place}" for place in range(WEIGHTS_PER_LAUNCH) for what in ("weight", "forward", "backward")]
_NUMBERS = [
    f"{what}{place}"
    for place in range(WEIGHTS_PER_LAUNCH)
    for what in ("outputs", "inputs", "stride_k", "stride_c", "stride_y", "stride_x", "first_tile")
]


def padded_channels(count: int) -> int:
    """``count`` rounded up to 16, 32 or 64, above that to a multiple of 64."""
    for padded in (16, 32):
        if count <= padded:
            return padded
    return -(-count // 64) * 64


@triton.jit
def _padded(count):
    return tl.where(count <= 16, 16, tl.where(count <= 32, 32, tl.cdiv(count, 64) * 64))


@triton.jit
def _pack(
    weight,
    forward,
    backward,
    outputs,
    inputs,
    stride_k,
    stride_c,
    stride_y,
    stride_x,
    tile,
    BACKWARD: tl.constexpr,
    TILE: tl.constexpr,
):
    padded_outputs = _padded(outputs)
    padded_inputs = _padded(inputs)
    tiles_across = tl.cdiv(padded_inputs, TILE)
    k = ((tile // tiles_across) * TILE + tl.arange(0, TILE)).to(tl.int64)
    c = ((tile % tiles_across) * TILE + tl.arange(0, TILE)).to(tl.int64)
    given = (k < outputs)[:, None] & (c < inputs)[None, :]
    kept = (k < padded_outputs)[:, None] & (c < padded_inputs)[None, :]
    source = weight + k[:, None] * stride_k + c[None, :] * stride_c
    # One program reads all taps: they share cache lines.
    for tap in tl.static_range(9):
        values = tl.load(source + (tap // 3) * stride_y + (tap % 3) * stride_x, mask=given, other=0.0)
        values = values.to(forward.dtype.element_ty)
        row = tap * padded_inputs + c
        tl.store(forward + row[:, None] * padded_outputs + k[None, :], tl.trans(values), mask=tl.trans(kept))
        if BACKWARD:
            row = (8 - tap) * padded_outputs + k
            tl.store(backward + row[:, None] * padded_inputs + c[None, :], values, mask=kept)


@triton.jit(do_not_specialize=_NUMBERS, do_not_specialize_on_alignment=_POINTERS)
def _pack_weights_kernel(
    weight0,
    forward0,
    backward0,
    weight1,
    forward1,
    backward1,
    weight2,
    forward2,
    backward2,
    outputs0,
    inputs0,
    stride_k0: tl.int64,
    stride_c0: tl.int64,
    stride_y0: tl.int64,
    stride_x0: tl.int64,
    first_tile0,
    outputs1,
    inputs1,
    stride_k1: tl.int64,
    stride_c1: tl.int64,
    stride_y1: tl.int64,
    stride_x1: tl.int64,
    first_tile1,
    outputs2,
    inputs2,
    stride_k2: tl.int64,
    stride_c2: tl.int64,
    stride_y2: tl.int64,
    stride_x2: tl.int64,
    first_tile2,
    BACKWARD: tl.constexpr,
    TILE: tl.constexpr,
):
    """The module's two formulas; a program owns a ``TILE`` by ``TILE`` piece of one weight, all taps of it."""
    tile = tl.program_id(0)
    if tile < first_tile1:
        _pack(
            weight0,
            forward0,
            backward0,
            outputs0,
            inputs0,
            stride_k0,
            stride_c0,
            stride_y0,
            stride_x0,
            tile - first_tile0,
            BACKWARD,
            TILE,
        )
    elif tile < first_tile2:
        _pack(
            weight1,
            forward1,
            backward1,
            outputs1,
            inputs1,
            stride_k1,
            stride_c1,
            stride_y1,
            stride_x1,
            tile - first_tile1,
            BACKWARD,
            TILE,
        )
    else:
        _pack(
            weight2,
            forward2,
            backward2,
            outputs2,
            inputs2,
            stride_k2,
            stride_c2,
            stride_y2,
            stride_x2,
            tile - first_tile2,
            BACKWARD,
            TILE,
        )


def _tiles(weight: Tensor) -> int:
    outputs, inputs = (ceil_div(padded_channels(count), TILE) for count in weight.shape[:2])
    return outputs * inputs


def packed_pieces(channels: Sequence[tuple[int, int]], dtype: torch.dtype, layout: Layout) -> list[Piece]:
    """Places for weights of so many outputs and inputs each, packed forward."""
    padded = [(padded_channels(outputs), padded_channels(inputs)) for outputs, inputs in channels]
    return [layout.add((TAPS * inputs, outputs), dtype) for outputs, inputs in padded]


class Packing:
    """How weights of one kind are cast and packed, three a launch.

    Args:
        weights: each ``[K, C, 3, 3]``, float32, bfloat16 or float16 (one dtype for all), any strides, on one GPU (on
            the CPU in Triton's interpreter). Nothing is checked here.
        dtype: of the packed weights, float32, bfloat16 or float16.
        forward: gets a place for each.
        backward: gets another for each, of what the input gradient reads; None where that is not packed.
    """

    def __init__(
        self, weights: Sequence[Tensor], dtype: torch.dtype, forward: Layout, backward: Layout | None = None
    ) -> None:
        channels = [(weight.shape[0], weight.shape[1]) for weight in weights]
        self.forward = packed_pieces(channels, dtype, forward)
        self.backward: list[Piece] = []
        if backward is not None:
            self.backward = packed_pieces([(inputs, outputs) for outputs, inputs in channels], dtype, backward)
        constants = {"BACKWARD": backward is not None, "TILE": TILE, **OPTIONS}
        self._launches: list[tuple[PlannedLaunch, tuple[int, ...]]] = []
        for first in range(0, len(weights), WEIGHTS_PER_LAUNCH):
            places: list[Place] = []
            numbers: list[int] = []
            programs = 0
            for place in range(first, first + WEIGHTS_PER_LAUNCH):
                # Where fewer are left the last one stands in, with no program of its own.
                place_or_last = min(place, len(weights) - 1)
                weight = weights[place_or_last]
                packed = Place(len(weights), self.forward[place_or_last])
                turned = Place(len(weights) + 1, self.backward[place_or_last]) if self.backward else packed
                places += [Place(place_or_last), packed, turned]
                numbers += [*weight.shape[:2], *weight.stride(), programs]
                if place < len(weights):
                    programs += _tiles(weight)
            launch = PlannedLaunch(_pack_weights_kernel, programs, places, constants)
            self._launches.append((launch, tuple(numbers)))

    def __call__(self, weights: Sequence[Tensor], forward: Tensor, backward: Tensor, stream: int) -> None:
        """Pack weights of that kind into memory of the two layouts, the second unused where there is none."""
        for launch, numbers in self._launches:
            launch((*weights, forward, backward), numbers, stream)
