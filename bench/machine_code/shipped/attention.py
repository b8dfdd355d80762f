"""The attention map's launches, forward and backward, in both layouts."""

from collections.abc import Iterator

import torch

from bench.machine_code.compiling import recorded
from bench.machine_code.shipped import ShippedLaunch
from ftfast.kernels import attention

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
LAYOUTS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}


def shipped_launches() -> Iterator[ShippedLaunch]:
    """Maps of 2x256x14x14."""
    for dtype in DTYPES:
        for layout, memory_format in LAYOUTS.items():
            features = torch.empty(2, 256, 14, 14, dtype=dtype).contiguous(memory_format=memory_format)
            with recorded(attention) as launches:
                maps = attention.attention_map(features, 2)
                attention.attention_gradient(features, maps, 2)
            what = f"2x256x14x14 {str(dtype).removeprefix('torch.')} {layout}"
            for direction, launch in zip(("forward", "backward"), launches, strict=True):
                yield ShippedLaunch(f"{direction} {what}", launch)
