"""The launches of a head computed layer by layer: round the library's convolutions, and the gradient at their end."""

from collections.abc import Iterator

import torch

from bench.machine_code.compiling import cache_key, recorded
from bench.machine_code.shipped import ShippedLaunch
from ftfast.commands.tune.heads import HEADS, HeadShape
from ftfast.kernels import activation
from ftfast.kernels.ft_head import copy_weights, ft_head_loss

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def run_launchers(head: HeadShape, dtype: torch.dtype, *, p: int = 1) -> None:
    """Every kernel of forward and backward, on each width of the student's maps."""
    place = (head.samples, head.height, head.width)
    factor = torch.empty(*place, head.factor, dtype=dtype)
    partials, weights = [], []
    for inputs, channels in ((head.student, head.student), (head.student, head.factor), (head.factor, head.factor)):
        features = torch.empty(*place, channels, dtype=dtype)
        activation.bias_leaky_relu_(features, torch.empty(channels), 0.1)
        partials.append(activation.leaky_relu_backward_(features, features, 0.1))
        weights.append(torch.empty(channels, inputs, 3, 3))
    activation.sum_partials(partials, torch.empty(()))
    copy_weights.scaled_like(copy_weights.cast_weights(weights, dtype), weights, torch.empty(()))
    statistics, upstream = torch.empty(5, head.samples), torch.empty(())
    ft_head_loss.scaled_direction(
        factor, factor, statistics, upstream, p=p, reduction="mean", weight=1.0, negative_slope=0.1
    )


def shipped_launches() -> Iterator[ShippedLaunch]:
    """Each kernel once; all architectures launch alike."""
    seen = set()
    for dtype in DTYPES:
        for head in HEADS.values():
            with recorded(activation) as epilogues, recorded(copy_weights) as copies, recorded(ft_head_loss) as ends:
                run_launchers(head, dtype)
            for launch in (*epilogues, *copies, *ends):
                if (key := cache_key(launch)) not in seen:
                    seen.add(key)
                    what = launch.kernel.__name__.removesuffix("_kernel").strip("_").replace("_", " ")
                    what += " by a scale" * bool(launch.arguments.get("SCALED"))
                    channels = launch.arguments.get("CHANNELS", head.factor)
                    yield ShippedLaunch(f"{what} {channels} of {head} {str(dtype).removeprefix('torch.')}", launch)
