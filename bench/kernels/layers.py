"""The heads' convolutions, their operands, and torch's ways to compute them; needs nothing but torch."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ftfast.commands.tune.heads import HeadShape

FORWARD, INPUT_GRADIENT, WEIGHT_GRADIENT = WORKS = ("forward", "input gradient", "weight gradient")
SLOPE = 0.1


class Layer(NamedTuple):
    """A convolution of a head."""

    samples: int
    channels_in: int
    channels_out: int
    height: int
    width: int

    @property
    def pixels(self) -> int:
        return self.samples * self.height * self.width

    @property
    def flops(self) -> int:
        return 2 * 9 * self.pixels * self.channels_in * self.channels_out

    @property
    def elements(self) -> int:
        """Of both maps and the weight."""
        channels = self.channels_in + self.channels_out
        return self.pixels * channels + 9 * self.channels_in * self.channels_out

    def __str__(self) -> str:
        return f"{self.samples}x{self.channels_in}->{self.channels_out}x{self.height}x{self.width}"


def layers_of(heads: Iterable[HeadShape]) -> list[Layer]:
    """The convolutions of heads, each once."""
    return list(
        dict.fromkeys(
            Layer(head.samples, inputs, outputs, head.height, head.width)
            for head in heads
            for side in ("student", "teacher")
            for inputs, outputs in head.layers(side)
        )
    )


# The widest maps of the students that a head stands behind whose channels are not the head's, by the head's name.
STUDENT_LAYERS = {"cifar-r56-r20": (Layer(128, 32, 32, 16, 16),)}


class Operands(NamedTuple):
    """Maps are channels_last, the weight in both the precision of training and that of the maps."""

    x: Tensor
    dz: Tensor
    master_weight: Tensor
    weight: Tensor
    bias: Tensor


def operands(layer: Layer, dtype: torch.dtype, device: torch.device, seed: int) -> Operands:
    """Random operands of a size that keeps results at about 1."""
    generator = torch.Generator().manual_seed(seed)
    _, inputs, outputs, height, width = layer

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    def as_map(values: Tensor) -> Tensor:
        return values.to(device, dtype).contiguous(memory_format=torch.channels_last)

    x = as_map(F.leaky_relu(normal(layer.samples, inputs, height, width), SLOPE))
    dz = as_map(normal(layer.samples, outputs, height, width))
    # What both precisions hold, so that the reference is one.
    weight = as_map(normal(outputs, inputs, 3, 3) / (3 * inputs**0.5))
    master = weight.to(torch.promote_types(dtype, torch.float32))
    return Operands(x, dz, master, weight, normal(outputs).to(device, dtype))


def library_steps(with_: Operands) -> dict[str, Callable[[], Tensor]]:
    """The library's way to each work."""
    x, dz, _, weight, bias = with_

    def gradient(wanted: int) -> Tensor:
        mask = [wanted == place for place in range(3)]
        found = torch.ops.aten.convolution_backward(dz, x, weight, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1, mask)
        return found[wanted]

    return {
        FORWARD: lambda: F.leaky_relu(F.conv2d(x, weight, bias, padding=1), SLOPE),
        INPUT_GRADIENT: lambda: gradient(0),
        WEIGHT_GRADIENT: lambda: gradient(1),
    }


def matmul_steps(layer: Layer, dtype: torch.dtype, device: torch.device) -> dict[str, Callable[[], Tensor]]:
    """Matmuls of the same sizes as the convolutions written as such, their operands laid out beforehand."""
    _, inputs, outputs, _, _ = layer

    def multiply(rows: int, inner: int, columns: int) -> Callable[[], Tensor]:
        # Random numbers: zeros draw less power and run faster.
        left = torch.empty(rows, inner, dtype=dtype, device=device).uniform_(-1, 1)
        right = torch.empty(inner, columns, dtype=dtype, device=device).uniform_(-1, 1)
        return lambda: left @ right

    return {
        FORWARD: multiply(layer.pixels, 9 * inputs, outputs),
        INPUT_GRADIENT: multiply(layer.pixels, 9 * outputs, inputs),
        WEIGHT_GRADIENT: multiply(9 * inputs, layer.pixels, outputs),
    }


@contextmanager
def fastest_library() -> Iterator[None]:
    """The library's convolutions are measured and the fastest taken, as training scripts ask for.

    Matmuls of float32 round their operands to TF32 where convolutions do, so that one can be the other's ceiling.
    """
    convolutions, matmuls = torch.backends.cudnn, torch.backends.cuda.matmul
    before = convolutions.benchmark, matmuls.allow_tf32
    convolutions.benchmark, matmuls.allow_tf32 = True, convolutions.allow_tf32
    try:
        yield
    finally:
        convolutions.benchmark, matmuls.allow_tf32 = before
