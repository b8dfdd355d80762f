"""Factor shapes, named after the teacher and student pairs that produce them."""

import re
from typing import NamedTuple


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
        FactorShape("imagenet-r50-mobilenet", 256, 1024, 7, 7),
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
