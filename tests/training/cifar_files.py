"""Small files in the format of CIFAR's python version."""

import hashlib
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor


def write_cifar(folder: Path, kind: Any, monkeypatch: pytest.MonkeyPatch, *, train: int, test: int) -> Tensor:
    """Random images in files for ``kind``, torchvision's class, whose checksums are made to fit.

    Args:
        train, test: images in each file.

    Returns:
        The training images ``[N, 3, 32, 32]`` uint8.
    """
    generator, images = np.random.default_rng(1), []
    base = folder / kind.base_folder
    base.mkdir(parents=True)
    key, classes = ("labels", 10) if kind.__name__ == "CIFAR10" else ("fine_labels", 100)
    for part, count in (("train_list", train), ("test_list", test)):
        sums = []
        for name, _ in getattr(kind, part):
            pixels = generator.integers(0, 256, (count, 3072), dtype=np.uint8)
            content = pickle.dumps({"data": pixels, key: [row % classes for row in range(count)]})
            (base / name).write_bytes(content)
            sums.append([name, hashlib.md5(content).hexdigest()])
            images += [torch.from_numpy(pixels.reshape(-1, 3, 32, 32))] * (part == "train_list")
        monkeypatch.setattr(kind, part, sums)
    content = pickle.dumps({kind.meta["key"]: [str(number) for number in range(classes)]})
    (base / kind.meta["filename"]).write_bytes(content)
    monkeypatch.setattr(kind, "meta", {**kind.meta, "md5": hashlib.md5(content).hexdigest()})
    return torch.cat(images)
