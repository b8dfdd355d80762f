"""Shapes of factors and heads, named after the teacher and student pairs that produce them."""

import re
from typing import NamedTuple

from ftfast.commands.tune.heads import HeadShape


class FactorShape(NamedTuple):
    """The shape ``[N, C, H, W]`` of a batch of factors: C is the teacher's channels times the paraphrase rate."""

    name: str
    samples: int
    channels: int
    height: int
    width: int

    @property
    def dims(self) -> tuple[int, int, int, int]:
        return self.samples, self.channels, self.height, self.width

    @property
    def numel(self) -> int:
        return self.samples * self.channels * self.height * self.width

    def __str__(self) -> str:
        return "x".join(map(str, self.dims))


SHAPES = {
    shape.name: shape
    for shape in (
        FactorShape("digits-r20-r8", 32, 32, 2, 2),
        FactorShape("cifar-r56-r20", 128, 32, 8, 8),
        FactorShape("cifar-wrn40x2-wrn16x2", 128, 64, 8, 8),
        FactorShape("imagenet-r34-r18", 256, 256, 7, 7),
        FactorShape("imagenet-r50-r18", 256, 1024, 7, 7),
    )
}
DEFAULT_SHAPES = ("cifar-r56-r20", "imagenet-r34-r18")
QUICK_SHAPES = ("digits-r20-r8",)


def parse_shape(text: str) -> FactorShape:
    """A shape by its name, or written out as NxCxHxW.

    Raises:
        ValueError: neither.
    """
    if text in SHAPES:
        return SHAPES[text]
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)x([1-9]\d*)x([1-9]\d*)", text)
    if match is None:
        raise ValueError(f"shape {text!r} is unknown; take one of {', '.join(SHAPES)}, or write NxCxHxW.")
    samples, channels, height, width = map(int, match.groups())
    return FactorShape(text, samples, channels, height, width)


DEFAULT_HEADS = {
    "cpu": ("cifar-r56-r20", "imagenet-r34-r18"),
    "cuda": ("cifar-r56-r20", "imagenet-r34-r18", "imagenet-r101-r50-stage3", "imagenet-r101-r50"),
}
QUICK_HEADS = ("digits-r20-r8",)
# A named head's batch where the GPU's would take minutes.
CPU_SAMPLES = {"imagenet-r34-r18": 32, "imagenet-r50-r18": 8, "imagenet-r101-r50-stage3": 4, "imagenet-r101-r50": 4}


def head_on(shape: HeadShape, device: str) -> HeadShape:
    """A named head with the batch that it is measured with on ``"cpu"`` or ``"cuda"``."""
    if device == "cpu" and shape.name in CPU_SAMPLES:
        return shape._replace(samples=CPU_SAMPLES[shape.name])
    return shape
