"""Folders and shards of small JPEG files whose classes can be told apart, for tests of what reads photographs."""

import io
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image


def make_folder(path: Path, *, classes: int = 20, train: int = 200, val: int = 60, seed: int = 0) -> None:
    """``train/CLASS/*.jpeg`` and ``val/CLASS/*.jpeg``: stripes whose colour and direction are the class's."""
    random = np.random.default_rng(seed)
    for part, count in (("train", train), ("val", val)):
        for number in range(count):
            label = number % classes
            folder = path / part / f"class{label:02}"
            folder.mkdir(parents=True, exist_ok=True)
            _photograph(label, classes, random).save(folder / f"{number:05}.jpeg", quality=90)


def _photograph(label: int, classes: int, random: np.random.Generator) -> Image.Image:
    height, width = (int(side) for side in random.integers(80, 200, 2))
    y, x = np.mgrid[0:height, 0:width]
    angle = np.pi * label / classes
    stripes = 0.5 + 0.5 * np.sin((x * np.cos(angle) + y * np.sin(angle)) / 4 + random.uniform(0, 6))
    hue = 2 * np.pi * label / classes + np.array([0, 2.1, 4.2])
    colour = 0.5 + 0.4 * np.cos(hue)
    pixels = 255 * np.clip(stripes[..., None] * colour + random.normal(0, 0.05, (height, width, 3)), 0, 1)
    return Image.fromarray(pixels.astype(np.uint8))


def make_shards(folder: Path, path: Path, *, images_per_shard: int = 50) -> None:
    """``part-00000.tar`` and so on of a folder's files, each with its class in a ``.cls`` beside it, shuffled."""
    path.mkdir(parents=True, exist_ok=True)
    for part in ("train", "val"):
        labels = {entry.name: label for label, entry in enumerate(sorted((folder / part).iterdir()))}
        files = sorted((folder / part).rglob("*.jpeg"))
        np.random.default_rng(0).shuffle(files)
        for start in range(0, len(files), images_per_shard):
            with tarfile.open(path / f"{part}-{start // images_per_shard:05}.tar", "w") as shard:
                for file in files[start : start + images_per_shard]:
                    add(shard, file.name, file.read_bytes())
                    add(shard, f"{file.stem}.cls", str(labels[file.parent.name]).encode())


def add(shard: tarfile.TarFile, name: str, content: bytes) -> None:
    """One member."""
    member = tarfile.TarInfo(name)
    member.size = len(content)
    shard.addfile(member, io.BytesIO(content))
