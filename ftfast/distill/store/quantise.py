"""Factors in few bits. The loss sees only a direction, so each is scaled as its dtype likes, and no scale is kept."""

import torch
from torch import Tensor

DTYPES = {
    "int8": torch.int8,
    "float8_e4m3fn": torch.float8_e4m3fn,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
# What a factor's largest number becomes. bfloat16 has float32's range, so a factor of a bfloat16 teacher stays itself.
_LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0, torch.float16: 1.0}


def quantise(factors: Tensor, dtype: torch.dtype) -> Tensor:
    """Factors ``[N, C, H, W]``, floating, to ``[N, H, W, C]`` contiguous in a dtype of :data:`DTYPES`.

    A factor of zeros stays one.
    """
    pixels = factors.permute(0, 2, 3, 1)
    if dtype in _LARGEST:
        pixels = pixels.float()
        largest = pixels.abs().amax((1, 2, 3), keepdim=True)
        pixels = pixels * torch.where(largest > 0, _LARGEST[dtype] / largest, 0)
        # Rounding may pass the largest number by a last bit, which in float8_e4m3fn would be nan.
        pixels = pixels.clamp_(-_LARGEST[dtype], _LARGEST[dtype])
    return (pixels.round_() if dtype == torch.int8 else pixels).to(dtype).contiguous()


def as_factors(stored: Tensor) -> Tensor:
    """``[N, H, W, C]`` as the loss takes it: ``[N, C, H, W]``, channels_last, nothing copied."""
    return stored.permute(0, 3, 1, 2)
