"""torchvision's training of a detector, and what Factor Transfer adds to it."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchmetrics.detection import MeanAveragePrecision
from torchvision.models.detection import FasterRCNN

from examples.detection.models import last_map
from ftfast import FactorTransfer, FeatureTaps, FrozenTeacher

Report = Callable[[int], object]  # takes how many steps were made


def collate(batch: list[Any]) -> tuple[Any, ...]:
    """Images of any size, and their targets."""
    return tuple(zip(*batch, strict=True))


def loader(dataset: Dataset, batch_size: int, workers: int, seed: int | None = None) -> DataLoader:
    """Batches in an order drawn with the seed, whole ones; without one in the data set's, all."""
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    shuffled = seed is not None
    return DataLoader(
        dataset,
        batch_size,
        shuffle=shuffled,
        drop_last=shuffled,
        num_workers=workers,
        collate_fn=collate,
        generator=generator,
    )


def endlessly(batches: DataLoader, device: torch.device) -> Iterator[tuple[list[Tensor], list[dict[str, Tensor]]]]:
    """Batches on the device, epoch after epoch."""
    while True:
        for images, targets in batches:
            yield (
                [image.to(device) for image in images],
                [{key: value.to(device) for key, value in target.items()} for target in targets],
            )


def frozen(teacher: FasterRCNN) -> FrozenTeacher:
    """The teacher's backbone up to its last map, which students learn from."""
    return FrozenTeacher(teacher.backbone, last_map(teacher))


class Resized:
    """The images of a loader's batches as a detector's backbone gets them: resized, normalised, padded to one size."""

    def __init__(self, batches: DataLoader, transform: nn.Module, device: torch.device) -> None:
        self.batches, self.transform, self.device = batches, transform, device

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Tensor]:
        for images, _ in self.batches:
            yield self.transform([image.to(self.device) for image in images])[0].tensors


def train(
    model: FasterRCNN,
    batches: DataLoader,
    steps: int,
    optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer],
    device: torch.device,
    report: Report,
    teacher: FrozenTeacher | None = None,
    head: FactorTransfer | None = None,
) -> dict[str, float]:
    """Trains a detector, where there is a head by the teacher's maps too; the losses of its last tenth of steps."""
    layers = {"images": "transform", "map": f"backbone.{last_map(model)}"}
    trained = nn.ModuleList([model, head.translator] if head else [model]).to(device).train()
    parameters = [parameter for parameter in trained.parameters() if parameter.requires_grad]
    updates, warm_up = optimizer(parameters), max(1, steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        updates, lambda step: min(1, (step + 1) / warm_up) * (1 + math.cos(math.pi * step / steps)) / 2
    )
    last: list[dict[str, Tensor]] = []
    with FeatureTaps(model, layers) as student:
        for step, (images, targets) in zip(range(steps), endlessly(batches, device), strict=False):
            losses, seen = student(images, targets)
            if head:
                assert teacher
                losses["ft"] = head(seen["map"], teacher(seen["images"][0].tensors).features)
            updates.zero_grad()
            sum(losses.values()).backward()
            nn.utils.clip_grad_norm_(parameters, 10.0)
            updates.step()
            schedule.step()
            if step >= steps - max(1, steps // 10):
                last.append({name: loss.detach() for name, loss in losses.items()})
            report(1)
    return {name: float(torch.stack([losses[name] for losses in last]).mean()) for name in last[0]}


@torch.no_grad()
def precision_of(model: FasterRCNN, batches: DataLoader, device: torch.device) -> dict[str, float]:
    """COCO's mean average precision in per cent, over overlaps from 0.5 to 0.95 and at 0.5."""
    metric = MeanAveragePrecision()
    model.to(device).eval()
    for images, targets in batches:
        found = model([image.to(device) for image in images])
        metric.update([{name: value.cpu() for name, value in each.items()} for each in found], list(targets))
    result = metric.compute()
    return {name: 100 * float(result[key]) for name, key in (("mAP", "map"), ("mAP50", "map_50"))}
