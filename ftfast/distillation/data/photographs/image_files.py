"""A picture's file as pixels, on the processor: every kind that is listed, and kinds that hide under another's name."""

import struct
from io import BytesIO

import numpy as np
import torch
from torch import Tensor

KINDS = ("jpg", "jpeg", "png", "webp", "bmp", "tif", "tiff", "ppm", "pgm")
"""How the names of files that are taken end; what a file is, its first bytes tell."""
MOST_PIXELS = 178_956_970  # of one picture, as Pillow has it: a few bytes can claim any number
JPEG = b"\xff\xd8"
# Pillow knows more kinds, of which some run other programs.
_OF_PILLOW = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM")
_WITH_16_BITS = ("PNG", "PPM")  # what these give as 32-bit integers is from 0 to 65535
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # markers whose segment has the size in pixels


class UndecodableError(ValueError):
    """A file that is no picture, a damaged one, or one of a kind that is not taken: the file's fault alone."""


def size_of(content: bytes) -> tuple[int, int]:
    """Height and width by the header alone.

    Raises:
        UndecodableError: no picture, or one of more than :data:`MOST_PIXELS` pixels.
    """
    height, width = _jpeg_size(content) or _picture_size(content)
    if height * width > MOST_PIXELS:
        raise UndecodableError(f"it has {width} x {height} pixels, more than {MOST_PIXELS}")
    return height, width


def _jpeg_size(content: bytes) -> tuple[int, int] | None:
    """In a tenth of the time that Pillow takes; None where this is no plain JPEG file."""
    place = 2
    if not content.startswith(JPEG):
        return None
    while place + 9 <= len(content) and content[place] == 0xFF:
        marker, length = content[place + 1], int.from_bytes(content[place + 2 : place + 4])
        if marker in _FRAMES:
            height, width = struct.unpack_from(">HH", content, place + 5)
            return (height, width) if height and width else None
        place += 1 if marker == 0xFF else 2 + length  # 0xFF fills
    return None


def _picture_size(content: bytes) -> tuple[int, int]:
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(BytesIO(content), formats=_OF_PILLOW) as header:
            width, height = header.size
    except MemoryError:
        raise
    except UnidentifiedImageError:
        raise UndecodableError("it cannot be identified as a picture") from None
    except Exception as error:  # whatever damaged files make of Pillow's many readers
        raise UndecodableError(str(error)) from None
    return height, width


def decode(content: Tensor) -> Tensor:
    """The first picture of a file ``[bytes]`` uint8 as ``[3, H, W]`` uint8; 16 bits become 8.

    They are rounded, but for those of a PNG in colours, of which Pillow reads the upper 8.

    Transparency is left out. An orientation in the EXIF data is not followed, as torchvision's ImageFolder does not.

    Raises:
        UndecodableError: damaged, or of a kind that is not taken.
        MemoryError, RuntimeError: the memory does not suffice.
    """
    start = bytes(content[: len(JPEG)].tolist())
    # Torchvision's decoder of PNG ends the process where a file's compressed data are damaged.
    read = _decode_by_torchvision if start == JPEG else _decode_by_pillow
    try:
        return read(content)
    except (MemoryError, ImportError):
        raise
    except Exception as error:
        if "DefaultCPUAllocator" in str(error):  # how torch says that it has no memory
            raise
        raise UndecodableError(str(error)) from None


def _decode_by_torchvision(content: Tensor) -> Tensor:
    from torchvision.io import ImageReadMode, decode_image

    return decode_image(content, ImageReadMode.RGB)


def _decode_by_pillow(content: Tensor) -> Tensor:
    from PIL import Image

    with Image.open(BytesIO(content.numpy().tobytes()), formats=_OF_PILLOW) as picture:
        if picture.mode.startswith("I;16") or (picture.mode == "I" and picture.format in _WITH_16_BITS):
            return _of_16_bits(torch.from_numpy(np.asarray(picture).astype(np.int32))).repeat(3, 1, 1)
        if picture.mode in ("I", "F"):
            raise UndecodableError("its numbers have 32 bits, of which nothing tells the range")
        picture.load()
        picture.info.pop("transparency", None)  # of a palette, Pillow warns of each picture that leaves it out
        return torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1).contiguous()


def _of_16_bits(pixels: Tensor) -> Tensor:
    """0 to 65535 as the nearest of 0 to 255, uint8."""
    return ((pixels.to(torch.int32) + 128) // 257).to(torch.uint8)
