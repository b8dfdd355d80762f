"""JPEG files of about ImageNet's size for benches: as a folder of one folder a class, and as tar shards."""

import io
import os
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

HEIGHT, WIDTH = 375, 500
QUALITY = 90
# Amplitudes of noise by the pixels over which it is smooth; together files of about 110 KB, as ImageNet's are.
OCTAVES = {128: 60.0, 64: 40.0, 32: 25.0, 16: 16.0, 8: 11.0, 4: 18.0, 2: 20.0, 1: 16.0}
CLASSES = 10
IMAGES_PER_SHARD = 256


def picture(random: np.random.Generator, height: int = HEIGHT, width: int = WIDTH) -> bytes:
    """A JPEG file of smooth noise."""
    from PIL import Image

    pixels = np.full((height, width, 3), 128.0)
    for scale, amplitude in OCTAVES.items():
        coarse = random.normal(size=(height // scale + 2, width // scale + 2, 3))
        grey = 0.8 * coarse.mean(2, keepdims=True) * 3**0.5 + 0.6 * coarse
        for channel in range(3):
            layer = Image.fromarray(grey[..., channel].astype(np.float32))
            pixels[..., channel] += amplitude * np.asarray(layer.resize((width, height), Image.Resampling.BICUBIC))
    content = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(content, "JPEG", quality=QUALITY)
    return content.getvalue()


def make_folder(folder: Path, *, train: int, val: int, distinct: int, classes: int = CLASSES, seed: int = 0) -> float:
    """``train/CLASS/*.jpeg`` and ``val/CLASS/*.jpeg``; returns the mean bytes of a file.

    Args:
        distinct: how many of the files differ; the others are links to them.
    """
    drawn = folder / "drawn"
    drawn.mkdir(parents=True)

    def draw(number: int) -> int:
        return (drawn / f"{number:05}.jpeg").write_bytes(picture(np.random.default_rng((seed, number))))

    with ThreadPoolExecutor() as pool:
        sizes = list(pool.map(draw, range(distinct)))
    for part, count in (("train", train), ("val", val)):
        for label in range(classes):
            (folder / part / f"class{label:04}").mkdir(parents=True)
        for number in range(count):
            source = drawn / f"{number % distinct:05}.jpeg"
            os.link(source, folder / part / f"class{number % classes:04}" / f"{number:06}.jpeg")
    return float(np.mean(sizes))


def make_shards(folder: Path, shards: Path) -> None:
    """``train-*.tar`` and ``val-*.tar`` of a folder's files, each with its class in a ``.cls``."""
    shards.mkdir(parents=True)
    for part in ("train", "val"):
        files = sorted((folder / part).rglob("*.jpeg"), key=lambda file: file.name)
        for start in range(0, len(files), IMAGES_PER_SHARD):
            with tarfile.open(shards / f"{part}-{start // IMAGES_PER_SHARD:05}.tar", "w") as shard:
                for file in files[start : start + IMAGES_PER_SHARD]:
                    _add(shard, file.name, file.read_bytes())
                    _add(shard, f"{file.stem}.cls", str(int(file.parent.name.removeprefix("class"))).encode())


def _add(shard: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    shard.addfile(member, io.BytesIO(content))
