"""Attention maps, and the gradient of the features that they are made of.

    m[n, i]  = mean over channels of f[n, :, i]^e
    df[n, c, i] = upstream[n, i] * e / C * f[n, c, i]^(e - 1)

Features are dense ``[N, C, H * W]``, or ``[N, H * W, C]`` where channels lie innermost; maps are ``[N, H * W]``
float32. A program owns a tile of pixels of one sample and walks its channels: every number is read once, and the order
of the sums is fixed. Backward needs the features and nothing else. Zagoruyko and Komodakis, "Paying More Attention to
Attention", ICLR 2017.
"""

# mypy: disallow-incomplete-defs=False
# (a kernel's parameters carry Triton's annotations, and only where Triton needs one)

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .device import device_guard
from .launch import ceil_div, power_of_2

LARGEST_EXPONENT = 4
# Along the innermost dimension a tile is at most as long as a warp's widest loads; the rest of its numbers lie across
# it, so that a map of few pixels fills its lanes too.
ALONG, TILE = 128, 4096
OPTIONS = {"num_warps": 8, "enable_fp_fusion": True}
_BYTES_AT_ONCE = 16


@triton.jit
def _power(x, EXPONENT: tl.constexpr):
    if EXPONENT == 0:
        result = tl.full(x.shape, 1.0, tl.float32)
    elif EXPONENT == 1:
        result = x
    elif EXPONENT == 2:
        result = x * x
    elif EXPONENT == 3:
        result = x * x * x
    else:
        result = (x * x) * (x * x)
    return result


@triton.jit
def _places(c, i, channels, pixels, CHANNELS_LAST: tl.constexpr):
    """Where channels ``c`` of pixels ``i`` are in a sample."""
    return c[:, None] + i[None, :] * channels if CHANNELS_LAST else c[:, None] * pixels + i[None, :]


@triton.jit
def _attention_map_kernel(
    features,  # [N, C, P] or [N, P, C]
    maps,  # [N, P]
    channel_units,
    pixel_units,
    UNIT_C: tl.constexpr,
    UNIT_P: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    EXPONENT: tl.constexpr,
    TILE_C: tl.constexpr,
    TILE_P: tl.constexpr,
):
    """The module's first formula; the grid is samples times tiles of pixels."""
    channels = channel_units * UNIT_C
    pixels = pixel_units * UNIT_P
    tiles = tl.cdiv(pixels, TILE_P)
    sample = (tl.program_id(0) // tiles).to(tl.int64)
    i = tl.program_id(0) % tiles * TILE_P + tl.arange(0, TILE_P)
    source = features + sample * channels * pixels
    sums = tl.zeros((TILE_C, TILE_P), tl.float32)
    for first in range(0, channels, TILE_C):
        c = first + tl.arange(0, TILE_C)
        within = (c < channels)[:, None] & (i < pixels)[None, :]
        places = _places(c, i, channels, pixels, CHANNELS_LAST)
        sums += _power(tl.load(source + places, mask=within, other=0.0).to(tl.float32), EXPONENT)
    tl.store(maps + sample * pixels + i, tl.sum(sums, 0) / channels, mask=i < pixels)


@triton.jit
def _attention_gradient_kernel(
    features,  # [N, C, P] or [N, P, C]
    upstream,  # [N, P]
    gradient,  # as features
    channel_units,
    pixel_units,
    UNIT_C: tl.constexpr,
    UNIT_P: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    EXPONENT: tl.constexpr,
    TILE_C: tl.constexpr,
    TILE_P: tl.constexpr,
):
    """The module's second formula; the grid is samples times tiles of pixels, by tiles of channels."""
    channels = channel_units * UNIT_C
    pixels = pixel_units * UNIT_P
    tiles = tl.cdiv(pixels, TILE_P)
    sample = (tl.program_id(0) // tiles).to(tl.int64)
    i = tl.program_id(0) % tiles * TILE_P + tl.arange(0, TILE_P)
    c = tl.program_id(1) * TILE_C + tl.arange(0, TILE_C)
    within = (c < channels)[:, None] & (i < pixels)[None, :]
    places = sample * channels * pixels + _places(c, i, channels, pixels, CHANNELS_LAST)
    factor = tl.load(upstream + sample * pixels + i, mask=i < pixels, other=0.0) * (EXPONENT / channels)
    values = tl.load(features + places, mask=within, other=0.0).to(tl.float32)
    result = _power(values, EXPONENT - 1) * factor[None, :]
    tl.store(gradient + places, result.to(gradient.dtype.element_ty), mask=within)


def _sizes(features: Tensor, exponent: int) -> dict[str, Any]:
    """What both kernels are told of the features' sizes.

    The innermost dimension is given in units that divide it, as long as a load where they can be: Triton assumes an
    alignment of rows only where it sees a factor, and 14 * 14 pixels have 4 of the 16 that it looks for by itself.
    """
    channels, pixels = features.shape[1], features.shape[2] * features.shape[3]
    channels_last = not features.is_contiguous()
    innermost = channels if channels_last else pixels
    unit = math.gcd(innermost, _BYTES_AT_ONCE // features.element_size())
    along = min(ALONG, power_of_2(innermost))
    return {
        "channel_units": channels // unit if channels_last else channels,
        "pixel_units": pixels if channels_last else pixels // unit,
        "UNIT_C": unit if channels_last else 1,
        "UNIT_P": 1 if channels_last else unit,
        "CHANNELS_LAST": channels_last,
        "EXPONENT": exponent,
        "TILE_C": along if channels_last else TILE // along,
        "TILE_P": TILE // along if channels_last else along,
    }


def attention_map(features: Tensor, exponent: int) -> Tensor:
    """``[N, C, H, W]``, contiguous or channels_last, float32, bfloat16 or float16, to ``[N, H*W]`` float32.

    Nothing is checked here; ``exponent`` is 1 to LARGEST_EXPONENT.
    """
    samples, _, height, width = features.shape
    maps = torch.empty((samples, height * width), dtype=torch.float32, device=features.device)
    sizes = _sizes(features, exponent)
    grid = (samples * ceil_div(height * width, sizes["TILE_P"]),)
    with device_guard(features.device):
        _attention_map_kernel[grid](features, maps, **sizes, **OPTIONS)
    return maps


def attention_gradient(features: Tensor, upstream: Tensor, exponent: int) -> Tensor:
    """The gradient of ``features``, in their dtype and layout, from that of their map ``[N, H*W]`` float32."""
    samples, channels, height, width = features.shape
    gradient = torch.empty_like(features)
    sizes = _sizes(features, exponent)
    grid = (samples * ceil_div(height * width, sizes["TILE_P"]), ceil_div(channels, sizes["TILE_C"]))
    with device_guard(features.device):
        _attention_gradient_kernel[grid](features, upstream, gradient, **sizes, **OPTIONS)
    return gradient
