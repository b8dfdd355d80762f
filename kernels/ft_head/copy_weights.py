"""Weights of 3x3 convolutions and their gradients, copied to another dtype and order of memory, three in a launch."""

# mypy: disallow-incomplete-defs=False
# (a kernel's parameters carry Triton's annotations, and only where Triton needs one)

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ftfast.kernels.device import device_guard
from ftfast.kernels.launch import INTERPRETED, ceil_div, launch

TILE = 32
WEIGHTS_PER_LAUNCH = 3
WARPS = 4

_POINTERS = [f"{what}{place}" for place in range(WEIGHTS_PER_LAUNCH) for what in ("source", "target")]
_NUMBERS = [
    f"{what}{place}"
    for place in range(WEIGHTS_PER_LAUNCH)
    for what in ("outputs", "inputs", "from_k", "from_c", "from_y", "from_x", "to_k", "to_c", "to_y", "to_x")
]


@triton.jit
def _rounded(values, DTYPE: tl.constexpr):
    """float32 values in a dtype; to bfloat16 the interpreter would cut them off."""
    if INTERPRETED and tl.bfloat16 == DTYPE:
        bits = values.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        return bits.to(tl.float32, bitcast=True).to(DTYPE)
    else:
        return values.to(DTYPE)


@triton.jit
def _copy(
    source, target, outputs, inputs, from_k, from_c, from_y, from_x, to_k, to_c, to_y, to_x, tile, factor,
    TILE: tl.constexpr,
):  # fmt: skip
    """``target[k, c, y, x] = source[k, c, y, x] * factor``; a program owns a ``TILE`` by ``TILE`` piece, all taps."""
    tiles_across = tl.cdiv(inputs, TILE)
    k = ((tile // tiles_across) * TILE + tl.arange(0, TILE)).to(tl.int64)
    c = ((tile % tiles_across) * TILE + tl.arange(0, TILE)).to(tl.int64)
    mask = (k < outputs)[:, None] & (c < inputs)[None, :]
    source += k[:, None] * from_k + c[None, :] * from_c
    target += k[:, None] * to_k + c[None, :] * to_c
    for tap in tl.static_range(9):
        values = tl.load(source + (tap // 3) * from_y + (tap % 3) * from_x, mask=mask, other=0.0).to(tl.float32)
        values = _rounded(values * factor, target.dtype.element_ty)
        tl.store(target + (tap // 3) * to_y + (tap % 3) * to_x, values, mask=mask)


@triton.jit(do_not_specialize=[*_NUMBERS, "tiles0", "tiles1"], do_not_specialize_on_alignment=_POINTERS)
def _copy_weights_kernel(
    source0, target0, source1, target1, source2, target2, scale,
    outputs0, inputs0, from_k0: tl.int64, from_c0: tl.int64, from_y0: tl.int64, from_x0: tl.int64,
    to_k0: tl.int64, to_c0: tl.int64, to_y0: tl.int64, to_x0: tl.int64,
    outputs1, inputs1, from_k1: tl.int64, from_c1: tl.int64, from_y1: tl.int64, from_x1: tl.int64,
    to_k1: tl.int64, to_c1: tl.int64, to_y1: tl.int64, to_x1: tl.int64,
    outputs2, inputs2, from_k2: tl.int64, from_c2: tl.int64, from_y2: tl.int64, from_x2: tl.int64,
    to_k2: tl.int64, to_c2: tl.int64, to_y2: tl.int64, to_x2: tl.int64,
    tiles0, tiles1,
    SCALED: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    factor = 1.0
    if SCALED:
        factor = tl.load(scale)
    if tile < tiles0:
        _copy(source0, target0, outputs0, inputs0, from_k0, from_c0, from_y0, from_x0, to_k0, to_c0, to_y0, to_x0,
              tile, factor, TILE)  # fmt: skip
    elif tile < tiles0 + tiles1:
        _copy(source1, target1, outputs1, inputs1, from_k1, from_c1, from_y1, from_x1, to_k1, to_c1, to_y1, to_x1,
              tile - tiles0, factor, TILE)  # fmt: skip
    else:
        _copy(source2, target2, outputs2, inputs2, from_k2, from_c2, from_y2, from_x2, to_k2, to_c2, to_y2, to_x2,
              tile - tiles0 - tiles1, factor, TILE)  # fmt: skip


def copy_weights(sources: Sequence[Tensor], targets: Sequence[Tensor], scale: Tensor | None = None) -> None:
    """``target = source * scale`` of each pair, rounded once, three pairs a launch.

    Args:
        sources, targets: each ``[K, C, 3, 3]``, float32, bfloat16 or float16, any strides, on one GPU (on the CPU in
            Triton's interpreter). Nothing is checked here.
        scale: 0-d float32 there; 1 where it is None.
    """
    for first in range(0, len(sources), WEIGHTS_PER_LAUNCH):
        pairs = list(zip(sources, targets, strict=True))[first : first + WEIGHTS_PER_LAUNCH]
        tiles = [ceil_div(source.shape[0], TILE) * ceil_div(source.shape[1], TILE) for source, _ in pairs]
        # Where fewer are left the last one stands in, with no program of its own.
        missing = WEIGHTS_PER_LAUNCH - len(pairs)
        pointers = [tensor for pair in pairs + pairs[-1:] * missing for tensor in pair]
        numbers: list[int] = []
        for source, target in pairs + pairs[-1:] * missing:
            numbers += (*source.shape[:2], *source.stride(), *target.stride())
        bounds = (tiles + [0] * missing)[:2]
        with device_guard(sources[0].device):
            launch(
                _copy_weights_kernel,
                sum(tiles),
                (*pointers, sources[0] if scale is None else scale),
                (*numbers, *bounds),
                {"SCALED": scale is not None, "TILE": TILE, "num_warps": WARPS, "enable_fp_fusion": False},
            )


def cast_weights(weights: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """The weights in a dtype and channels_last, those that are so already themselves, three others a launch."""
    cast = [
        weight
        if weight.dtype == dtype and weight.is_contiguous(memory_format=torch.channels_last)
        else torch.empty_like(weight, dtype=dtype, memory_format=torch.channels_last)
        for weight in weights
    ]
    pairs = [(weight, result) for weight, result in zip(weights, cast, strict=True) if result is not weight]
    if pairs:
        copy_weights([weight for weight, _ in pairs], [result for _, result in pairs])
    return cast


def scaled_like(gradients: Sequence[Tensor], parameters: Sequence[Tensor], scale: Tensor) -> list[Tensor]:
    """The gradients times a scale in their parameter's dtype and layout, so that autograd keeps them without a copy."""
    results = [torch.empty_like(parameter) for parameter in parameters]
    if results:
        copy_weights(gradients, results, scale)
    return results
