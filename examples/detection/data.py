"""What is detected in: Pascal VOC and COCO as torchvision reads them, or generated scenes."""

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset
from torchvision import datasets
from torchvision.transforms import v2

from examples.detection import scenes


class Data(NamedTuple):
    """Data sets of ``(image [3, H, W] from 0 to 1, {"boxes": [n, 4], "labels": [n], ...})`` and how many classes there
    are, the background, which is 0, among them.
    """

    train: Dataset
    test: Dataset
    classes: int


class Boxes(Dataset):
    """A data set of torchvision's in that form: every image has boxes, perhaps none of them.

    Args:
        crowds: keep boxes round a crowd, which count in an evaluation alone.
    """

    def __init__(self, dataset: Dataset, *, crowds: bool) -> None:
        keys = ["boxes", "labels"] + ["iscrowd"] * isinstance(dataset, datasets.CocoDetection)
        self.dataset = datasets.wrap_dataset_for_transforms_v2(dataset, keys)
        self.crowds = crowds

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Tensor]]:
        image, found = self.dataset[index]
        boxes = torch.as_tensor(found.get("boxes", [])).as_subclass(Tensor).float().reshape(-1, 4)
        labels = torch.as_tensor(found.get("labels", []), dtype=torch.int64)
        crowd = torch.as_tensor(found.get("iscrowd", [0] * len(boxes)), dtype=torch.int64)
        kept = (boxes[:, 2:] > boxes[:, :2]).all(1) & ((crowd == 0) | self.crowds)
        target = {"boxes": boxes[kept], "labels": labels[kept], "iscrowd": crowd[kept]}
        return image.as_subclass(Tensor), target


def read(name: str, folder: Path | None, images: int | None = None) -> Data:
    """``voc`` (2007: trainval and test), ``coco`` (2017: train, its images with boxes, and val) or ``scenes``.

    Args:
        folder: which has ``VOCdevkit/VOC2007``; or ``train2017``, ``val2017`` and ``annotations``.
        images: take the first so many of the training images and half as many of the others; of scenes make so many.
    """
    if name == "scenes":
        return scene_data(images or 400)
    if folder is None:
        raise ValueError(f"--data {name} needs --data-dir, the folder where it lies.")
    train, test = (_voc if name == "voc" else _coco)(folder)
    if images:
        train, test = Subset(train, range(images)), Subset(test, range(-(-images // 2)))
    return Data(train, test, 21 if name == "voc" else 91)


def scene_data(images: int) -> Data:
    """So many scenes to train with, and half as many to test with."""
    return Data(scenes.Scenes(images, seed=1), scenes.Scenes(-(-images // 2), seed=2), len(scenes.NAMES))


def _transform(*augmentation: v2.Transform) -> v2.Transform:
    return v2.Compose([v2.ToImage(), *augmentation, v2.ToDtype(torch.float32, scale=True)])


def _voc(folder: Path) -> tuple[Dataset, Dataset]:
    train = datasets.VOCDetection(folder, "2007", "trainval", transforms=_transform(v2.RandomHorizontalFlip()))
    test = datasets.VOCDetection(folder, "2007", "test", transforms=_transform())
    return Boxes(train, crowds=False), Boxes(test, crowds=True)


def coco(images: Path, labels: Path, *, training: bool) -> Dataset:
    """Images of a folder in COCO's format, in training those with boxes alone."""
    augmentation = [v2.RandomHorizontalFlip()] if training else []
    dataset = datasets.CocoDetection(images, labels, transforms=_transform(*augmentation))
    found = Boxes(dataset, crowds=not training)
    if not training:
        return found
    return Subset(found, [place for place, it in enumerate(dataset.ids) if dataset.coco.getAnnIds(it, iscrowd=False)])


def _coco(folder: Path) -> tuple[Dataset, Dataset]:
    train, val = (
        coco(folder / f"{part}2017", folder / "annotations" / f"instances_{part}2017.json", training=part == "train")
        for part in ("train", "val")
    )
    return train, val
