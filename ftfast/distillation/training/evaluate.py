"""What a classifier is worth: its accuracy on images that it was not trained on."""

from collections.abc import Callable, Generator
from contextlib import closing
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ftfast.distillation.data.images import Batches
from ftfast.distillation.runtime.processes import ALONE, Processes
from ftfast.distillation.runtime.signals import Stopped
from ftfast.distillation.training.step.step import Precision

# An accuracy of the five likeliest classes is told of where there are this many.
LEAST_CLASSES_FOR_TOP5 = 100


class Accuracies(NamedTuple):
    """A classifier's accuracy in percent, mean cross-entropy, and of many classes that of the likeliest five."""

    accuracy: float
    cross_entropy: float
    top5_accuracy: float | None


@torch.no_grad()
def logits_of(model: nn.Module, images: Batches, precision: Precision) -> tuple[Tensor, Tensor]:
    """``[N, classes]`` float32 in the images' order, and their labels; the model's mode is left as it was."""
    logits, labels = zip(*_tested(model, images, precision), strict=True)
    images.check_damage_limit(images.damaged())
    return torch.cat(logits), torch.cat(labels)


@torch.no_grad()
def evaluate(
    model: nn.Module,
    images: Batches,
    precision: Precision,
    processes: Processes = ALONE,
    stop: Callable[[], bool] = lambda: False,
) -> Accuracies:
    """What a classifier is worth; of many processes, each judges its own images.

    Running statistics, which each process has of its own batches, become those of the first one, which are kept.

    Args:
        stop: asked before every batch whether to end there, equally often in every process.

    Raises:
        Stopped: ``stop`` said so.
    """
    processes.take_from_first(model.buffers())
    sums = torch.zeros(6, dtype=torch.float64, device=precision.device)
    questions = images.test_steps(processes.part.ranks)
    with closing(_tested(model, images, precision, processes)) as batches:
        for logits, labels in batches:
            questions -= 1
            _raise_if(stop)
            correct = (logits.argmax(1) == labels).sum()
            entropy = nn.functional.cross_entropy(logits, labels, reduction="sum")
            top5, counted = torch.zeros_like(correct), 0
            if logits.shape[1] >= LEAST_CLASSES_FOR_TOP5:
                top5, counted = (logits.topk(5, dim=1).indices == labels[:, None]).sum(), len(labels)
            counts = (torch.full_like(entropy, number) for number in (len(labels), counted))
            sums[:5] += torch.stack([value.double() for value in (correct, entropy, top5, *counts)])
    for _ in range(questions):
        _raise_if(stop)
    sums[5] = images.damaged()
    correct, entropy, top5, count, counted, damaged = processes.sum(sums).tolist()
    images.check_damage_limit(int(damaged))
    return Accuracies(100 * correct / count, entropy / count, 100 * top5 / counted if counted else None)


def _raise_if(stop: Callable[[], bool]) -> None:
    if stop():
        raise Stopped


def _tested(
    model: nn.Module, images: Batches, precision: Precision, processes: Processes = ALONE
) -> Generator[tuple[Tensor, Tensor]]:
    was_training = model.training
    model.eval()
    try:
        for batch, labels in images.in_order(images.test_batch_size, processes.part):
            with precision.autocast():
                logits = model(batch)
            yield logits.float(), labels
    finally:
        model.train(was_training)
