"""Photographs as their files' bytes, decoded by the processor one by one or by a GPU's nvJPEG in batches."""

import logging
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from ftfast.distillation.data.in_memory import Normalisation
from ftfast.distillation.data.photographs import crops, image_files
from ftfast.distillation.data.photographs.image_files import UndecodableError
from ftfast.errors import DataError, shown
from ftfast.ops.crop_resize import can_crop, crop_resize


class Colours(NamedTuple):
    """Mean and deviation of a photograph's three colours, of pixels from 0 to 1."""

    mean: tuple[float, ...]
    deviation: tuple[float, ...]


# Of ImageNet's training images; torchvision's models and most of timm's were trained with these.
IMAGENET = Colours((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def of_photographs(described: dict[str, Any]) -> Colours:
    """Those that a checkpoint's ``"photographs"`` name, or ImageNet's where they name none."""
    if "mean" not in described:
        return IMAGENET
    return Colours(tuple(described["mean"]), tuple(described["deviation"]))


def to_photographs(colours: Colours) -> dict[str, Any]:
    """What :func:`of_photographs` reads; nothing of ImageNet's, as checkpoints had it before there were others."""
    return {} if colours == IMAGENET else {name: list(values) for name, values in colours._asdict().items()}


_log = logging.getLogger("ftfast")


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
            UndecodableError: no picture.
        """
        height, width = image_files.size_of(content)
        return cls(torch.frombuffer(bytearray(content), dtype=torch.uint8), height, width, name)

    @property
    def is_jpeg(self) -> bool:
        return bytes(self.content[:2].tolist()) == image_files.JPEG

    def decode(self) -> Tensor:
        """``[3, H, W]`` uint8, on the CPU.

        Raises:
            UndecodableError: damaged.
        """
        pixels = image_files.decode(self.content)
        if not self.fits(pixels):
            raise UndecodableError(f"its header says {self.width} x {self.height} pixels, and it has others")
        return pixels

    def fits(self, pixels: Tensor) -> bool:
        """Whether pixels have the size that the header gives, from which boxes are drawn."""
        return pixels.shape == (3, self.height, self.width)


class Read(NamedTuple):
    """A photograph on its way: its bytes, the box to cut (the middle where there is none), and its pixels where the
    processor has decoded them already, ``[3, H, W]`` uint8 on the CPU."""

    encoded: Encoded
    box: crops.Box | None
    pixels: Tensor | None = None


def decode_batch(
    photographs: Sequence[Read],
    labels: Tensor,
    size: int,
    device: torch.device,
    on_processor: Callable[[Callable[[Encoded], Tensor | None], list[Encoded]], Iterable[Tensor | None]] = map,
    colours: Colours = IMAGENET,
) -> tuple[Tensor, Tensor, list[str]]:
    """Decoded, cut, mirrored and normalised on the device: ``[N, 3, size, size]`` float32, channels_last.

    Another of the batch stands in for a damaged one, with its label.

    Args:
        labels: on the CPU.
        on_processor: ``map``, or what does its work in several threads.
        colours: to normalise by.

    Returns:
        The images, their labels on the CPU, and the damaged ones' names.

    Raises:
        DataError: all are damaged.
    """
    decoded = _decode(photographs, device, on_processor)
    damaged = [place for place in range(len(photographs)) if place not in decoded]
    if not decoded:
        first = shown(photographs[0].encoded.name)
        raise DataError(f"none of {len(photographs)} photographs can be decoded, the first {first}.")
    stand_in = next(iter(decoded))
    places = [place if place in decoded else stand_in for place in range(len(photographs))]
    boxes = [photographs[place].box for place in places]
    squares = cut_batch([decoded[place] for place in places], boxes, size, colours)
    return squares, labels[torch.tensor(places)], [photographs[place].encoded.name for place in damaged]


def cut_batch(
    decoded: Sequence[Tensor], boxes: Sequence[crops.Box | None], size: int, colours: Colours = IMAGENET
) -> Tensor:
    """``[3, H, W]`` uint8 each to ``[N, 3, size, size]`` float32, normalised, channels_last, on their device.

    Where our kernel runs that is one launch; else torchvision's, several for each photograph.
    """
    device = decoded[0].device
    if can_crop(device):
        windows = [
            crops.middle_of(pixels.shape[1], pixels.shape[2], size) if box is None else crops.window_of(box, size)
            for pixels, box in zip(decoded, boxes, strict=True)
        ]
        return crop_resize(decoded, windows, size, mean=colours.mean, deviation=colours.deviation)
    squares = [
        crops.cut_middle(pixels, size) if box is None else crops.cut_box(pixels, box, size)
        for pixels, box in zip(decoded, boxes, strict=True)
    ]
    return normalise(torch.stack(squares), colours)


def normalise(pixels: Tensor, colours: Colours = IMAGENET) -> Tensor:
    """``[N, 3, H, W]`` uint8 to float32, channels_last."""
    return _normalisation(pixels.device, colours).apply(pixels).contiguous(memory_format=torch.channels_last)


@lru_cache
def _normalisation(device: torch.device, colours: Colours) -> Normalisation:
    return Normalisation.of(255, *colours).to(device)


def _decode(
    photographs: Sequence[Read],
    device: torch.device,
    on_processor: Callable[[Callable[[Encoded], Tensor | None], list[Encoded]], Iterable[Tensor | None]],
) -> dict[int, Tensor]:
    """nvJPEG where it can, which has no PNG and not every JPEG; else the processor; the damaged ones are left out."""
    from torchvision.io import ImageReadMode, decode_jpeg

    found = {place: read.pixels for place, read in enumerate(photographs) if read.pixels is not None}
    if device.type == "cuda":
        found = {place: pixels.to(device, non_blocking=True) for place, pixels in found.items()}
        jpegs = [place for place, read in enumerate(photographs) if place not in found and read.encoded.is_jpeg]
        try:
            contents = [photographs[place].encoded.content for place in jpegs]
            if contents:
                decoded = zip(jpegs, decode_jpeg(contents, ImageReadMode.RGB, device=device), strict=True)
                found |= {place: pixels for place, pixels in decoded if photographs[place].encoded.fits(pixels)}
        except RuntimeError as error:  # one that it cannot decode spoils the batch
            _say_once(str(error).strip().partition("\n")[0])
    left = [place for place in range(len(photographs)) if place not in found]
    pixels_left = on_processor(decode_or_none, [photographs[place].encoded for place in left])
    for place, pixels in zip(left, pixels_left, strict=True):
        if pixels is not None:
            found[place] = pixels.to(device)
    return found


@lru_cache
def _say_once(reason: str) -> None:
    _log.warning("nvJPEG cannot decode a batch, and the processor does: %s", reason)


def decode_or_none(encoded: Encoded) -> Tensor | None:
    """:meth:`Encoded.decode`, and None where it is damaged."""
    try:
        return encoded.decode()
    except UndecodableError:
        return None
