"""The launches of the grouped head, every kernel of forward and backward, for the named heads."""

from collections.abc import Iterator

import torch

from bench.machine_code.compiling import ARCHITECTURES, Launch, cache_key, recorded, replaced
from bench.machine_code.shipped import ShippedLaunch
from bench.shapes import HEADS, HeadShape
from ftfast.kernels import (
    conv3x3_tiles,
    ft_head_gradient_sums,
    ft_head_grouped,
    ft_head_grouped_backward,
    ft_head_loss,
)
from ftfast.kernels.pack_weights import PackedWeight, padded_channels

DTYPES = (torch.bfloat16, torch.float32)
MODULES = (ft_head_grouped, ft_head_loss, ft_head_grouped_backward, ft_head_gradient_sums)


def packed(channels: int, channels_out: int, dtype: torch.dtype) -> PackedWeight:
    """A packed weight that nobody filled."""
    inputs, outputs = padded_channels(channels), padded_channels(channels_out)
    return PackedWeight(torch.empty(9 * inputs, outputs, dtype=dtype), torch.empty(9 * outputs, inputs, dtype=dtype))


def run_launchers(head: HeadShape, dtype: torch.dtype, *, p: int = 1, input_precision: str = "tf32") -> None:
    """Forward and backward."""
    place = (head.samples, head.height, head.width)
    student, teacher = (torch.empty(*place, channels, dtype=dtype) for channels in (head.student, head.teacher))
    weights = {side: [packed(*layer, dtype) for layer in head.layers(side)] for side in ("student", "teacher")}
    biases = {side: [torch.empty(outputs) for _, outputs in head.layers(side)] for side in ("student", "teacher")}
    loss, kept = ft_head_grouped.grouped_head_forward(
        student,
        teacher,
        None,
        [each.forward for each in weights["student"]],
        biases["student"],
        [each.forward for each in weights["teacher"]],
        biases["teacher"],
        p=p,
        reduction="mean",
        eps=1e-12,
        weight=1.0,
        student_slope=0.1,
        teacher_slope=0.1,
        input_precision=input_precision,
    )
    ft_head_grouped_backward.grouped_head_backward(
        student,
        kept,
        [each.backward for each in weights["student"] if each.backward is not None],
        loss,
        p=p,
        reduction="mean",
        weight=1.0,
        negative_slope=0.1,
        need_student_gradient=True,
        input_precision=input_precision,
    )


def launches_of(
    head: HeadShape, dtype: torch.dtype, architecture: int, *, p: int = 1, input_precision: str = "tf32"
) -> list[Launch]:
    """What forward and backward launch on a device of this architecture, in order."""
    with (
        replaced(conv3x3_tiles, capability=lambda device: architecture),
        recorded(ft_head_grouped) as forward,
        recorded(ft_head_loss) as ends,
        recorded(ft_head_grouped_backward) as backward,
        recorded(ft_head_gradient_sums) as sums,
    ):
        run_launchers(head, dtype, p=p, input_precision=input_precision)
    return [*forward, *ends, *backward, *sums]


def shipped_launches() -> Iterator[ShippedLaunch]:
    """Each kernel once; every architecture has tiles of its own."""
    seen = set()
    for architecture in ARCHITECTURES:
        for dtype in DTYPES:
            for head in HEADS.values():
                for launch in launches_of(head, dtype, architecture):
                    key = (architecture, *cache_key(launch, architecture))
                    if key in seen:
                        continue
                    seen.add(key)
                    what = launch.kernel.__name__.removesuffix("_kernel").strip("_").replace("_", " ")
                    arguments = launch.arguments
                    multiplies = what in ("grouped forward", "grouped backward")
                    if what == "grouped forward":
                        what += f" {arguments['FIRST_CHANNELS']}->{arguments['FIRST_OUT']}"
                    elif what == "grouped backward":
                        what += f" {arguments['CHANNELS']}->{arguments['COLUMNS']}"
                        what += "" if arguments["HAS_OUTPUT"] else " first layer"
                    name = f"{what} of {head} {str(dtype).removeprefix('torch.')}"
                    yield ShippedLaunch(name, launch, (architecture,), multiplies)
