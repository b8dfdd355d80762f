"""How a photograph becomes a square: the box that is cut at random for training, the middle for tests.

A seed gives the same box to every loader, and boxes are drawn as torchvision draws them.
"""

import math
from random import Random
from typing import NamedTuple

import numpy as np
from torch import Tensor

from ftfast.ops.crop_resize import Window

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


def draw_box(height: int, width: int, seed: int) -> Box:
    """A box of a photograph of that size (Szegedy et al. 2015, section 6), as torchvision's RandomResizedCrop.

    The seed alone decides, and torch's own random state stays as it is: boxes are drawn in threads too.
    """
    drawn = Random(seed).random  # of all of Random's draws the one that no version of Python changes
    ratios = [math.log(ratio) for ratio in RATIO]
    flip = drawn() < 0.5
    for _ in range(10):
        area = height * width * (SCALE[0] + (SCALE[1] - SCALE[0]) * drawn())
        ratio = math.exp(ratios[0] + (ratios[1] - ratios[0]) * drawn())
        cut_width, cut_height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < cut_width <= width and 0 < cut_height <= height:
            top, left = int(drawn() * (height - cut_height + 1)), int(drawn() * (width - cut_width + 1))
            return Box(top, left, cut_height, cut_width, flip)
    cut_height = min(height, round(width / RATIO[0]))  # the middle, as much of it as the ratios allow
    cut_width = min(width, round(height * RATIO[1]))
    return Box((height - cut_height) // 2, (width - cut_width) // 2, cut_height, cut_width, flip)


def window_of(box: Box, size: int) -> Window:
    """The box as :func:`cut_box` cuts it, for the kernel."""
    return Window(box.top, box.left, box.height, box.width, size, size, 0, 0, box.flip)


def middle_of(height: int, width: int, size: int) -> Window:
    """The middle of a photograph as :func:`cut_middle` cuts it, for the kernel."""
    shorter = round(size / MIDDLE)
    scaled = int(shorter * max(height, width) / min(height, width))
    grid = (shorter, scaled) if height <= width else (scaled, shorter)
    first_row, first_column = (round((side - size) / 2) for side in grid)
    return Window(0, 0, height, width, *grid, first_row, first_column, False)


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
    return int(sample_seeds(seed, epoch, np.array([index]))[0])


def sample_seeds(seed: int, epoch: int, indices: np.ndarray) -> np.ndarray:
    """:func:`sample_seed` of many photographs: ``[N]`` to ``[N]`` uint64."""
    mixed = np.zeros(len(indices), np.uint64)
    for part in (np.uint64(seed), np.uint64(epoch), indices.astype(np.uint64)):  # splitmix64's finaliser
        mixed = mixed + part + np.uint64(0x9E3779B97F4A7C15)
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        mixed ^= mixed >> np.uint64(31)
    return mixed
