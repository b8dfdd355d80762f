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

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import device_guard

LARGEST_EXPONENT = 4
# Along the innermost dimension a tile is as long as a warp's widest loads, across it as deep as hides their latency.
ALONG, ACROSS = 128, 16
OPTIONS = {"num_warps": 4, "enable_fp_fusion": True}


@triton.jit
def _power(x, EXPONENT: tl.constexpr):
    if EXPONENT == 0:
        result = x * 0 + 1
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
def _attention_map_kernel(
    features,  # [N, C, P] or [N, P, C]
    maps,  # [N, P]
    channels,
    pixels,
    stride_c,
    stride_p,
    EXPONENT: tl.constexpr,
    TILE_C: tl.constexpr,
    TILE_P: tl.constexpr,
):
    """The module's first formula; the grid is samples by tiles of pixels."""
    sample = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * TILE_P + tl.arange(0, TILE_P)
    source = features + sample * channels * pixels
    sums = tl.zeros((TILE_C, TILE_P), tl.float32)
    for first in range(0, channels, TILE_C):
        c = first + tl.arange(0, TILE_C)
        within = (c < channels)[:, None] & (i < pixels)[None, :]
        values = tl.load(source + c[:, None] * stride_c + i[None, :] * stride_p, mask=within, other=0.0).to(tl.float32)
        sums += _power(values, EXPONENT)
    tl.store(maps + sample * pixels + i, tl.sum(sums, 0) / channels, mask=i < pixels)


@triton.jit
def _attention_gradient_kernel(
    features,  # [N, C, P] or [N, P, C]
    upstream,  # [N, P]
    gradient,  # as features
    channels,
    pixels,
    stride_c,
    stride_p,
    EXPONENT: tl.constexpr,
    TILE_C: tl.constexpr,
    TILE_P: tl.constexpr,
):
    """The module's second formula; the grid is samples by tiles of pixels by tiles of channels."""
    sample = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * TILE_P + tl.arange(0, TILE_P)
    c = tl.program_id(2) * TILE_C + tl.arange(0, TILE_C)
    within = (c < channels)[:, None] & (i < pixels)[None, :]
    places = sample * channels * pixels + c[:, None] * stride_c + i[None, :] * stride_p
    factor = tl.load(upstream + sample * pixels + i, mask=i < pixels, other=0.0) * (EXPONENT / channels)
    values = tl.load(features + places, mask=within, other=0.0).to(tl.float32)
    result = _power(values, EXPONENT - 1) * factor[None, :]
    tl.store(gradient + places, result.to(gradient.dtype.element_ty), mask=within)


class _Layout(NamedTuple):
    """Strides of a sample's channels and pixels, and the tile that goes along the innermost of them."""

    stride_c: int
    stride_p: int
    tile_c: int
    tile_p: int


def _layout(features: Tensor) -> _Layout:
    channels, height, width = features.shape[1:]
    if features.is_contiguous():
        return _Layout(height * width, 1, ACROSS, ALONG)
    return _Layout(1, channels, ALONG, ACROSS)


def attention_map(features: Tensor, exponent: int) -> Tensor:
    """``[N, C, H, W]``, contiguous or channels_last, float32, bfloat16 or float16, to ``[N, H*W]`` float32.

    Nothing is checked here; ``exponent`` is 1 to LARGEST_EXPONENT.
    """
    samples, channels, height, width = features.shape
    pixels, layout = height * width, _layout(features)
    maps = torch.empty((samples, pixels), dtype=torch.float32, device=features.device)
    grid = (samples, triton.cdiv(pixels, layout.tile_p))
    with device_guard(features.device):
        _attention_map_kernel[grid](
            features,
            maps,
            channels,
            pixels,
            layout.stride_c,
            layout.stride_p,
            EXPONENT=exponent,
            TILE_C=layout.tile_c,
            TILE_P=layout.tile_p,
            **OPTIONS,
        )
    return maps


def attention_gradient(features: Tensor, upstream: Tensor, exponent: int) -> Tensor:
    """The gradient of ``features``, in their dtype and layout, from that of their map ``[N, H*W]`` float32."""
    samples, channels, height, width = features.shape
    pixels, layout = height * width, _layout(features)
    gradient = torch.empty_like(features)
    grid = (samples, triton.cdiv(pixels, layout.tile_p), triton.cdiv(channels, layout.tile_c))
    with device_guard(features.device):
        _attention_gradient_kernel[grid](
            features,
            upstream,
            gradient,
            channels,
            pixels,
            layout.stride_c,
            layout.stride_p,
            EXPONENT=exponent,
            TILE_C=layout.tile_c,
            TILE_P=layout.tile_p,
            **OPTIONS,
        )
    return gradient
