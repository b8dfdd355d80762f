"""Heads by the teacher and student pairs that have them."""

import re
from typing import NamedTuple


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
            f"head is {text!r}; it takes {', '.join(HEADS)}, or NxSTUDENT+TEACHER:FACTORxHxW as in 128x64+64:32x8x8."
        )
    samples, student, teacher, factor, height, width = match.groups()
    sizes = (int(samples), int(student), int(teacher or student), int(factor), int(height), int(width))
    return HeadShape(str(HeadShape("", *sizes)), *sizes)
