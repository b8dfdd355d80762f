"""The packing of a head's weights for the single pass: the translator's for both directions, the paraphraser's once."""

from collections.abc import Iterator

import torch

from bench.machine_code.compiling import recorded
from bench.machine_code.shipped import ShippedLaunch
from ftfast.kernels.ft_head import pack_weights
from ftfast.kernels.layout import Layout


def pack_for_head(weights: list[torch.Tensor], dtype: torch.dtype, *, backward: bool) -> None:
    """Pack a translator's weights, or a paraphraser's, which are read forward alone."""
    forward, turned = Layout(), Layout()
    packing = pack_weights.Packing(weights, dtype, forward, turned if backward else None)
    device = weights[0].device
    packing(weights, forward.empty(device), turned.empty(device), 0)


def shipped_launches() -> Iterator[ShippedLaunch]:
    """Sizes are numbers of the launch, so there is a kernel for each dtype and direction."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for backward in (False, True):
            weights = [torch.empty(outputs, inputs, 3, 3) for inputs, outputs in ((64, 64), (64, 32), (32, 32))]
            with recorded(pack_weights) as launches:
                pack_for_head(weights, dtype, backward=backward)
            what = "both directions" if backward else "forward"
            yield ShippedLaunch(f"{what} {str(dtype).removeprefix('torch.')}", launches[0])
