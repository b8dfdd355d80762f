"""Photographs as their files' bytes, decoded by the processor one by one or by a GPU's nvJPEG in batches."""

from collections.abc import Sequence
from contextlib import suppress
from io import BytesIO
from typing import NamedTuple, Self

import torch
from torch import Tensor

from ftfast.distill import crops
from ftfast.distill.datasets import DataError

_JPEG = b"\xff\xd8"


class Encoded(NamedTuple):
    """A file's bytes, the size in pixels that its header gives, and its name."""

    content: Tensor
    height: int
    width: int
    name: str

    @classmethod
    def of(cls, content: bytes, name: str) -> Self:
        """Reads the header alone.

        Raises:
            ValueError: no picture.
        """
        from PIL import Image, UnidentifiedImageError

        try:
            with Image.open(BytesIO(content)) as header:
                width, height = header.size
        except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError) as error:
            raise ValueError(str(error)) from None
        return cls(torch.frombuffer(bytearray(content), dtype=torch.uint8), height, width, name)

    @property
    def is_jpeg(self) -> bool:
        return bytes(self.content[:2].tolist()) == _JPEG

    def decode(self) -> Tensor:
        """``[3, H, W]`` uint8, on the CPU.

        Raises:
            RuntimeError: damaged.
        """
        from torchvision.io import ImageReadMode, decode_image

        return decode_image(self.content, ImageReadMode.RGB)


def decode_batch(
    photographs: Sequence[tuple[Encoded, crops.Box | None]], labels: Tensor, size: int, device: torch.device
) -> tuple[Tensor, Tensor, list[str]]:
    """Decoded, cut and mirrored on the device: ``[N, 3, size, size]`` uint8, labels, and the damaged ones' names.

    Another of the batch stands in for a damaged one, with its label.

    Args:
        photographs: with the box to cut; the middle where there is none.

    Raises:
        DataError: all are damaged.
    """
    decoded = _decode([encoded for encoded, _ in photographs], device)
    damaged = [place for place in range(len(photographs)) if place not in decoded]
    if not decoded:
        raise DataError(f"none of {len(photographs)} photographs can be decoded, the first {photographs[0][0].name}.")
    stand_in = next(iter(decoded))
    places = [place if place in decoded else stand_in for place in range(len(photographs))]
    squares = []
    for place in places:
        box = photographs[place][1]
        pixels = decoded[place]
        squares.append(crops.cut_middle(pixels, size) if box is None else crops.cut_box(pixels, box, size))
    return torch.stack(squares), labels[torch.tensor(places)], [photographs[place][0].name for place in damaged]


def _decode(photographs: Sequence[Encoded], device: torch.device) -> dict[int, Tensor]:
    """nvJPEG where it can, which has no PNG and not every JPEG; else the processor; the damaged ones are left out."""
    from torchvision.io import ImageReadMode, decode_jpeg

    found: dict[int, Tensor] = {}
    jpegs = [place for place, encoded in enumerate(photographs) if encoded.is_jpeg]
    if device.type == "cuda" and jpegs:
        try:
            contents = [photographs[place].content for place in jpegs]
            found = dict(zip(jpegs, decode_jpeg(contents, ImageReadMode.RGB, device=device), strict=True))
        except RuntimeError:
            found = {}
    for place, encoded in enumerate(photographs):
        if place not in found:
            with suppress(RuntimeError):
                found[place] = encoded.decode().to(device)
    return found
