"""How a photograph becomes a square: the box that is cut at random for training, the middle for tests.

The boxes are torchvision's, so every loader has the same, and a seed gives the same box to all of them.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

SCALE = (0.08, 1.0)  # of the photograph's area
RATIO = (3 / 4, 4 / 3)  # width over height
MIDDLE = 0.875  # the tested square's side over the photograph's shorter side


class Box(NamedTuple):
    """Pixels that are cut out of a photograph, and whether they are mirrored."""

    top: int
    left: int
    height: int
    width: int
    flip: bool


class Cut(NamedTuple):
    """A photograph by its number, and the box that is cut out of it."""

    row: int
    box: Box


class Views(NamedTuple):
    """A photograph by its number, and how many boxes of it are drawn: those of the epochs 0, 1, ... of ``seed``."""

    row: int
    seed: int
    boxes: int


def draw_box(height: int, width: int) -> Box:
    """A box of a photograph of that size, from torch's random state (Szegedy et al. 2015, section 6)."""
    from torchvision.transforms import RandomResizedCrop

    photograph = torch.empty(1, height, width, device="meta")
    place = RandomResizedCrop.get_params(photograph, list(SCALE), list(RATIO))
    top, left, cut_height, cut_width = place
    return Box(top, left, cut_height, cut_width, flip=bool(torch.rand(()) < 0.5))


def cut_box(photograph: Tensor, box: Box, size: int) -> Tensor:
    """``[3, H, W]`` uint8 to the box as ``[3, size, size]`` uint8, on the same device."""
    from torchvision.transforms.v2 import functional

    place = (box.top, box.left, box.height, box.width)
    square = functional.resized_crop(photograph, *place, [size, size], antialias=True)
    return functional.horizontal_flip(square) if box.flip else square


def cut_middle(photograph: Tensor, size: int) -> Tensor:
    """``[3, H, W]`` uint8 to its middle ``[3, size, size]`` uint8, as photographs are tested."""
    from torchvision.transforms.v2 import functional

    resized = functional.resize(photograph, [round(size / MIDDLE)], antialias=True)
    return functional.center_crop(resized, [size, size])


def sample_seed(seed: int, epoch: int, index: int) -> int:
    """Of one photograph's box in one epoch: no process, order or resumption changes it."""
    mixed = 0
    for part in (seed, epoch, index):  # splitmix64's finaliser, in few instructions
        mixed = (mixed + part + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
        mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
        mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
        mixed ^= mixed >> 31
    return mixed


def sample_seeds(seed: int, epoch: int, indices: np.ndarray) -> np.ndarray:
    """:func:`sample_seed` of many photographs: ``[N]`` to ``[N]`` uint64."""
    mixed = np.zeros(len(indices), np.uint64)
    for part in (np.uint64(seed), np.uint64(epoch), indices.astype(np.uint64)):
        mixed = mixed + part + np.uint64(0x9E3779B97F4A7C15)
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        mixed ^= mixed >> np.uint64(31)
    return mixed
