"""Batches that a loader of one's own gives, for the training loop."""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ftfast.distillation.data.images import Batches
from ftfast.distillation.runtime.processes import WHOLE, Part
from ftfast.distillation.runtime.seeds import seed_of
from ftfast.errors import DistillError


class LoaderError(DistillError):
    """A loader that does not give batches of images and labels."""


class FromLoader(Batches):
    """The batches of a loader as it gives them, on a device; for one process.

    What the loader draws from torch's generator in this process follows from seed, epoch and step alone: the order of
    a DataLoader with ``shuffle=True``, say, and random crops without workers. An epoch that goes on at a step passes
    over the batches before it. Nothing is promised of what a loader draws from generators of its own.

    Args:
        loader: batches that begin with images ``[N, C, H, W]``, floating, and labels ``[N]``, int64; gone through again
            for every epoch, and with a length.
        name: of the argument, for errors.

    Attributes:
        classes: of the student, once they are known; labels of others are refused from then on.
    """

    classes: int | None = None

    def __init__(self, loader: Iterable[Any], name: str, device: torch.device) -> None:
        self._loader, self._name, self._device = loader, name, device
        if isinstance(loader, Tensor) or not hasattr(loader, "__iter__"):
            raise TypeError(f"{name} is a {type(loader).__name__}; it takes a loader of (images, labels) batches.")
        try:
            self._steps = len(loader)  # type: ignore[arg-type]
        except TypeError:
            raise TypeError(
                f"{name} is a {type(loader).__name__} without a length; it takes a DataLoader or a list, which can be "
                "gone through again and says how many batches it has."
            ) from None
        if not self._steps:
            raise LoaderError(f"{name} has no batches; it takes a loader of at least one.")

    def __len__(self) -> int:
        return self._steps

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self.in_order(0)

    def steps(self, batch_size: int) -> int:
        return self._steps

    def test_steps(self, ranks: int) -> int:
        return self._steps

    def step_size(self, batch_size: int, step: int) -> int | None:
        return None

    def draw(
        self, batch_size: int, *, seed: int, epoch: int, first_step: int = 0, part: Part = WHOLE
    ) -> Iterator[tuple[Tensor, ...]]:
        for step, batch in enumerate(self._batches(partial(_seed, seed, epoch))):
            if step >= first_step:
                yield self._checked(batch)

    def in_order(self, batch_size: int, part: Part = WHOLE) -> Iterator[tuple[Tensor, Tensor]]:
        for batch in self._batches():
            yield self._checked(batch)

    def first(self) -> tuple[Tensor, Tensor]:
        """A batch, to see what it is like."""
        return next(self.in_order(0))

    def check_labels(self, labels: Tensor) -> None:
        """Raises LoaderError where one is of no class of the student's."""
        if self.classes is None:
            return
        least, most = labels.to(torch.int64).aminmax()
        if least < 0 or most >= self.classes:
            wrong = int(least if least < 0 else most)
            raise LoaderError(f"{self._name} has label {wrong} and student gives logits of {self.classes} classes.")

    def _batches(self, before: Callable[[int], None] = lambda _: None) -> Iterator[Any]:
        """A pass; ``before`` is called before the pass, and before each batch is asked for, with its step."""
        before(self._steps)
        iterator = iter(self._loader)
        for step in range(self._steps):
            before(step)
            batch = next(iterator, None)
            if batch is None:
                break
            yield batch
        if batch is None and step == 0:
            raise LoaderError(f"{self._name} gives no batch when it is gone through again; it takes a DataLoader.")

    def _checked(self, batch: Any) -> tuple[Tensor, Tensor]:
        name = self._name
        if not isinstance(batch, tuple | list) or len(batch) < 2 or not all(isinstance(it, Tensor) for it in batch[:2]):
            raise LoaderError(f"{name} gives a {type(batch).__name__}; it takes batches (images, labels) of tensors.")
        images, labels = batch[:2]
        if images.dim() != 4 or not images.is_floating_point():
            raise LoaderError(
                f"{name} gives images {list(images.shape)} of {images.dtype}; it takes floating ones [N, C, H, W], "
                "normalised as the teacher takes them."
            )
        if labels.shape != images.shape[:1] or labels.is_floating_point():
            raise LoaderError(
                f"{name} gives labels {list(labels.shape)} of {labels.dtype} with {len(images)} images; it takes one "
                "whole number for each."
            )
        if not len(images):
            raise LoaderError(f"{name} gives a batch without images; it takes batches of at least one.")
        if labels.device.type == "cpu":  # to read them on a GPU would wait for it at every step
            self.check_labels(labels)
        images = images.to(self._device, torch.float32, non_blocking=True)
        return images.contiguous(memory_format=torch.channels_last), labels.to(self._device, torch.int64)


def _seed(*numbers: int) -> None:
    torch.default_generator.manual_seed(seed_of(*numbers))
