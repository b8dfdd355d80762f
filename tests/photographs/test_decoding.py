"""A picture's file as pixels: every kind that is listed, 16 bits a colour, several frames, and what is damaged."""

import io
import shutil
import struct
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from ftfast.distillation.data.photographs import image_files as decoding
from ftfast.distillation.data.photographs import listing
from ftfast.distillation.data.photographs.decoding import Encoded
from ftfast.distillation.data.photographs.image_files import KINDS, UndecodableError, decode
from tests.photographs.photograph_folder import make_folder
from tests.photographs.test_streamed import SIDE, drawn, on_device, streamed_of

PNG = b"\x89PNG\r\n\x1a\n"
HEIGHT, WIDTH = 45, 37
RANDOM = np.random.default_rng(0)
PIXELS = RANDOM.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
GREY = RANDOM.integers(0, 65536, (HEIGHT, WIDTH), dtype=np.uint16)
PICTURE, OTHER = Image.fromarray(PIXELS), Image.fromarray(PIXELS[::-1].copy())
PILLOWS = {"jpg": "JPEG", "jpeg": "JPEG", "tif": "TIFF", "pgm": "PPM"}


def written(picture: Image.Image, kind: str, **options: Any) -> bytes:
    content = io.BytesIO()
    picture.save(content, kind, **options)
    return content.getvalue()


def decoded(content: bytes) -> Tensor:
    return decode(torch.frombuffer(bytearray(content), dtype=torch.uint8))


def png_of_16_bits(pixels: np.ndarray) -> bytes:
    """Of ``[H, W, 3]`` uint16, which Pillow does not write."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    height, width = pixels.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    head = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    return PNG + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_that_is_listed_is_decoded_as_pillow_decodes_it(kind: str) -> None:
    picture = PICTURE.convert("L") if kind == "pgm" else PICTURE
    content = written(picture, PILLOWS.get(kind, kind.upper()))
    with Image.open(io.BytesIO(content)) as read:
        expected = torch.from_numpy(np.array(read.convert("RGB"))).permute(2, 0, 1)
    assert torch.equal(decoded(content), expected)
    assert decoding.size_of(content) == (HEIGHT, WIDTH)


@pytest.mark.parametrize(
    ("kind", "mode"), [*(("PNG", mode) for mode in ("1", "L", "LA", "P", "RGBA")), ("TIFF", "L"), ("TIFF", "CMYK")]
)
def test_every_way_to_keep_colours_gives_three_of_them(kind: str, mode: str) -> None:
    picture = PICTURE.convert(mode)
    expected = torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1)
    assert torch.equal(decoded(written(picture, kind)), expected)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PGM", "PNG in colour"])
def test_16_bits_are_scaled_as_8_are(kind: str) -> None:
    colours = np.broadcast_to(GREY[..., None], (HEIGHT, WIDTH, 3))
    contents = {
        "PNG in colour": lambda: png_of_16_bits(colours),
        "PGM": lambda: f"P5\n{WIDTH} {HEIGHT}\n65535\n".encode() + GREY.astype(">u2").tobytes(),
    }
    content = contents.get(kind, lambda: written(Image.fromarray(GREY), kind))()
    found = decoded(content)
    assert found.dtype == torch.uint8
    assert np.abs(found.numpy() - GREY / 257).max() <= (1 if kind == "PNG in colour" else 0.5)
    # The same picture in 8 bits, spread over 16, is what it was.
    eight = png_of_16_bits(PIXELS.astype(np.uint16) * 257)
    assert torch.equal(decoded(eight), torch.from_numpy(PIXELS).permute(2, 0, 1))


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_the_first_of_several_frames_is_taken(kind: str) -> None:
    options = {"lossless": True} if kind == "WEBP" else {}
    several = written(PICTURE, kind, save_all=True, append_images=[OTHER], **options)
    assert torch.equal(decoded(several), decoded(written(PICTURE, kind, **options)))


@pytest.mark.parametrize("orientation", [3, 6])
def test_an_orientation_is_left_alone_as_torchvisions_folder_leaves_it(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    for kind in ("JPEG", "PNG", "WEBP", "TIFF"):
        options: dict[str, Any] = {"lossless": True} if kind == "WEBP" else {}
        content = written(PICTURE, kind, exif=exif, **options)
        with Image.open(io.BytesIO(content)) as read:
            expected = np.array(read.convert("RGB"))  # as torchvision's pil_loader; Pillow turns TIFF's by itself
        found = Encoded.of(content, "a").decode()
        assert torch.equal(found.permute(1, 2, 0), torch.from_numpy(expected)), kind


def broken_files() -> dict[str, bytes]:
    plain = {kind: written(PICTURE, kind) for kind in ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM")}
    files = {
        f"{kind} cut to {part:.0%}": it[: int(len(it) * part)] for kind, it in plain.items() for part in (0.1, 0.6)
    }
    for kind, content in plain.items():
        noise = bytearray(content)
        noise[8:60] = RANDOM.bytes(52)
        files[f"{kind} with noise in its head"] = bytes(noise)
    claims_much = bytearray(plain["JPEG"])
    place = claims_much.index(b"\xff\xc0")
    claims_much[place + 5 : place + 9] = b"\xff\xff\xff\xff"
    floats = written(Image.fromarray(GREY.astype(np.float32)), "TIFF")
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"
    return {**files, "claims much": bytes(claims_much), "floats": floats, "PostScript": postscript, "empty": b""}


def test_whatever_is_broken_is_the_files_fault() -> None:
    """Never another error, whose number would end a run; some noise is a picture all the same."""
    undecodable = set()
    for name, content in broken_files().items():
        try:
            with warnings.catch_warnings(action="ignore"):
                pixels = Encoded.of(content, name).decode()
            assert pixels.dtype == torch.uint8
        except UndecodableError:
            undecodable.add(name)
    assert undecodable >= {"JPEG cut to 10%", "PNG cut to 60%", "TIFF cut to 60%", "claims much", "floats"}
    assert undecodable >= {"PostScript", "empty", "BMP cut to 60%"}


def test_a_size_that_is_not_the_headers_is_damage(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "decode", lambda _: torch.zeros(3, 2, 2, dtype=torch.uint8))
    with pytest.raises(UndecodableError, match="its header says 37 x 45 pixels"):
        Encoded.of(written(PICTURE, "PNG"), "a").decode()


@pytest.mark.parametrize("sign", [MemoryError("no more"), RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_a_lack_of_memory_is_no_damage(monkeypatch: pytest.MonkeyPatch, sign: Exception) -> None:
    def fail(_: Tensor) -> Tensor:
        raise sign

    monkeypatch.setattr(decoding, "_decode_by_torchvision", fail)
    with pytest.raises(type(sign), match=r"no more|allocate"):
        Encoded.of(written(PICTURE, "JPEG"), "a").decode()


@pytest.mark.parametrize("place", [0.3, 0.9])
@pytest.mark.parametrize("bits", [8, 16])
def test_damage_within_a_png_does_not_end_the_process(bits: int, place: float) -> None:
    """A changed byte of the compressed pixels was a segmentation fault in torchvision's decoder."""
    content = bytearray(written(PICTURE, "PNG") if bits == 8 else png_of_16_bits(PIXELS.astype(np.uint16) * 251))
    content[int(len(content) * place)] ^= 0x55
    with pytest.raises(UndecodableError):
        decoded(bytes(content))


def test_transparency_is_left_out_without_a_word() -> None:
    """Pillow warns of a palette's, for every picture."""
    picture = PICTURE.convert("P")
    for kind, transparency in (("PNG", bytes(range(256))), ("PNG", 3), ("GIF", 3)):
        with warnings.catch_warnings(action="error"):
            found = decoded(written(picture, kind, transparency=transparency))
        assert torch.equal(found, decoded(written(picture, kind)))


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """JPEG files among which each other kind is, some under the name of a JPEG."""
    folder = tmp_path_factory.mktemp("mixed")
    make_folder(folder, classes=3, train=30, val=6)
    files = sorted(folder.glob("train/*/*"))
    for file, kind in zip(files[:14:2], KINDS[2:], strict=True):
        file.unlink()
        picture = PICTURE.convert("L") if kind == "pgm" else PICTURE
        file.with_suffix(f".{kind.upper()}").write_bytes(written(picture, PILLOWS.get(kind, kind.upper())))
    files[15].write_bytes(written(Image.fromarray(GREY), "PNG"))
    files[17].write_bytes(written(PICTURE, "GIF", save_all=True, append_images=[OTHER]))
    files[19].write_bytes(written(PICTURE, "WEBP", save_all=True, append_images=[OTHER]))
    return folder


@pytest.mark.parametrize(("workers", "at_once"), [(0, False), (1, False), (1, True)])
def test_all_kinds_together_make_an_epoch(mixed: Path, workers: int, at_once: bool) -> None:
    said: list[str] = []
    images = streamed_of(mixed, workers=workers, report=said.append)
    pixels, _ = drawn(on_device(images) if at_once else images)
    images.close()
    assert pixels.shape == (30, 3, SIDE, SIDE)
    assert float(pixels.abs().max()) < 2.7  # what 255 becomes, normalised
    assert said == []


def test_other_files_are_not_listed(mixed: Path, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    shutil.copytree(mixed, folder)
    for name in ("words.txt", "picture.gif", "jpg", "Thumbs.db"):
        (folder / "train" / "class01" / name).write_bytes(b"words")
    found = listing.list_photographs(folder, "folder", "train")
    assert len(found.labels) == 30
