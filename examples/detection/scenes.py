"""Generated scenes to detect in: circles, squares and triangles of any colour over noise, each with its box."""

import torch
from torch import Tensor
from torch.utils.data import Dataset

NAMES = ("background", "circle", "square", "triangle")
SMALLEST, LARGEST = 80, 128  # an image's sides
SMALLEST_RADIUS, LARGEST_RADIUS = 6, 20
MOST_SHAPES = 5
NOISE = 0.2


class Scenes(Dataset):
    """Images ``[3, H, W]`` from 0 to 1, of sides from 80 to 128, with ``{"boxes": [n, 4], "labels": [n]}`` as
    torchvision's detectors take them. A scene depends on ``seed`` and its number alone, and shows 1 to 5 shapes.
    """

    def __init__(self, count: int, seed: int) -> None:
        self.count, self.seed = count, seed

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Tensor]]:
        if not 0 <= index < self.count:
            raise IndexError(index)
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + index)

        def between(low: int, high: int) -> int:
            return int(torch.randint(low, high + 1, (), generator=generator))

        height, width = between(SMALLEST, LARGEST), between(SMALLEST, LARGEST)
        image = torch.rand(3, 1, 1, generator=generator) + NOISE * torch.randn(3, height, width, generator=generator)
        rows, columns = torch.arange(height).view(-1, 1), torch.arange(width)
        boxes: list[list[int]] = []
        labels: list[int] = []
        for _ in range(between(1, MOST_SHAPES)):
            radius, label = between(SMALLEST_RADIUS, LARGEST_RADIUS), between(1, 3)
            row, column = between(radius, height - 1 - radius), between(radius, width - 1 - radius)
            box = [column - radius, row - radius, column + radius + 1, row + radius + 1]
            if any(_overlap(box, other) for other in boxes):
                continue
            inside = _form(NAMES[label], rows - row, columns - column, radius)
            colour = torch.rand(3, 1, 1, generator=generator)
            shape = colour + NOISE * torch.randn(3, height, width, generator=generator)
            image = torch.where(inside, shape, image)
            boxes.append(box)
            labels.append(label)
        return image.clamp(0, 1), {"boxes": torch.tensor(boxes).float(), "labels": torch.tensor(labels)}


def _form(name: str, down: Tensor, right: Tensor, radius: int) -> Tensor:
    """Which pixels at these distances from its middle a shape covers."""
    if name == "circle":
        return down**2 + right**2 <= radius**2
    inside = (down.abs() <= radius) & (right.abs() <= radius)
    return inside if name == "square" else inside & (2 * right.abs() <= down + radius)


def _overlap(box: list[int], other: list[int]) -> bool:
    return box[0] < other[2] and other[0] < box[2] and box[1] < other[3] and other[1] < box[3]
