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


class HeadShape(NamedTuple):
    """A head's features: batch, the student's and the teacher's channels, the factor's, and the map."""

    name: str
    samples: int
    student: int
    teacher: int
    factor: int
    height: int
    width: int

    @property
    def pixels(self) -> int:
        return self.samples * self.height * self.width

    def layers(self, side: str) -> list[tuple[int, int]]:
        """``(channels_in, channels_out)`` of the three convolutions of ``"student"`` or ``"teacher"``."""
        channels = self.student if side == "student" else self.teacher
        return [(channels, channels), (channels, self.factor), (self.factor, self.factor)]

    def __str__(self) -> str:
        teacher = "" if self.teacher == self.student else f"+{self.teacher}"
        return f"{self.samples}x{self.student}{teacher}->{self.factor}x{self.height}x{self.width}"


HEADS = {
    shape.name: shape
    for shape in (
        HeadShape("digits-r20-r8", 32, 16, 64, 32, 2, 2),
        HeadShape("cifar-r56-r20", 128, 64, 64, 32, 8, 8),
        HeadShape("cifar-wrn40x2-wrn16x2", 128, 128, 128, 64, 8, 8),
        HeadShape("imagenet-r34-r18", 256, 512, 512, 256, 7, 7),
        HeadShape("imagenet-r50-r18", 256, 512, 2048, 1024, 7, 7),
        HeadShape("imagenet-r101-r50-stage3", 64, 1024, 1024, 512, 14, 14),
        HeadShape("imagenet-r101-r50", 256, 2048, 2048, 1024, 7, 7),
    )
}
DEFAULT_HEADS = {
    "cpu": ("cifar-r56-r20", "imagenet-r34-r18"),
    "cuda": ("cifar-r56-r20", "imagenet-r34-r18", "imagenet-r101-r50-stage3", "imagenet-r101-r50"),
}
QUICK_HEADS = ("digits-r20-r8",)
# A named head's batch where the GPU's would take minutes.
CPU_SAMPLES = {"imagenet-r34-r18": 32, "imagenet-r50-r18": 8, "imagenet-r101-r50-stage3": 4, "imagenet-r101-r50": 4}


def parse_head(text: str) -> HeadShape:
    """A head by its name, or written out as NxSTUDENT+TEACHER:FACTORxHxW; +TEACHER where it is not STUDENT.

    ``->``, as tables have it, may stand for ``:``, which no shell takes for a redirection.

    Raises:
        ValueError: neither.
    """
    if text in HEADS:
        return HEADS[text]
    number = r"([1-9]\d*)"
    match = re.fullmatch(rf"{number}x{number}(?:\+{number})?(?::|->){number}x{number}x{number}", text)
    if match is None:
        raise ValueError(
            f"head {text!r} is unknown; take one of {', '.join(HEADS)}, or write NxSTUDENT+TEACHER:FACTORxHxW."
        )
    samples, student, teacher, factor, height, width = match.groups()
    sizes = (int(samples), int(student), int(teacher or student), int(factor), int(height), int(width))
    return HeadShape(str(HeadShape("", *sizes)), *sizes)


def head_on(shape: HeadShape, device: str) -> HeadShape:
    """A named head with the batch that it is measured with on ``"cpu"`` or ``"cuda"``."""
    if device == "cpu" and shape.name in CPU_SAMPLES:
        return shape._replace(samples=CPU_SAMPLES[shape.name])
    return shape
