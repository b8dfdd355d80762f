"""What a training draws its batches from: images in memory, files read as they are needed, a store, or a loader."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Self

import numpy as np
import torch
from torch import Tensor

from ftfast.distillation.data.stratified import stratified_folds, stratified_rows
from ftfast.distillation.runtime.processes import WHOLE, Part


class Batches(ABC):
    """Labelled images in batches, of all processes together; batch sizes are those of all processes together too."""

    @abstractmethod
    def steps(self, batch_size: int) -> int:
        """How many batches an epoch has."""

    @abstractmethod
    def test_steps(self, ranks: int) -> int:
        """How many batches :meth:`in_order` gives the process that has most of them, of so many processes."""

    @property
    def test_batch_size(self) -> int:
        """How many images go through a network at once where nothing is learned."""
        return 250

    @abstractmethod
    def draw(
        self, batch_size: int, *, seed: int, epoch: int, first_step: int = 0, part: Part = WHOLE
    ) -> Iterator[tuple[Tensor, ...]]:
        """An epoch's batches: images ``[N, C, H, W]`` float32, channels_last, and labels.

        Args:
            first_step: where to go on in the epoch.
            part: the rows of every batch that are wanted.
        """

    @abstractmethod
    def step_size(self, batch_size: int, step: int) -> int | None:
        """The images of a batch over all processes; None where only the batch itself says it."""

    @abstractmethod
    def in_order(self, batch_size: int, part: Part = WHOLE) -> Iterator[tuple[Tensor, Tensor]]:
        """Images as they are tested, once and in order, with their labels; of several processes, each takes its own."""

    def damaged(self) -> int:
        """How many files of the pass that is under way, or ended last, this process could not decode."""
        return 0

    def check_damage_limit(self, count: int) -> None:  # noqa: B027  without files there is none
        """Says how many files of a pass all processes together could not decode.

        Raises:
            DataError: more than a pass may have.
        """

    def close(self) -> None:  # noqa: B027
        """Ends what reads ahead; images are drawn anew where they are asked for again."""


class Images(Batches):
    """Batches of known images, each of which can be had by its number.

    :meth:`draw` gives every image once, augmented and normalised. Order and augmentation follow from seed, epoch and
    step alone, whatever the number of processes, so that a resumed epoch draws what it would have. There are
    :func:`steps_of` batches of nearly equal size: a last batch of one image would upset batch norms.
    """

    @abstractmethod
    def __len__(self) -> int: ...

    def steps(self, batch_size: int) -> int:
        return steps_of(len(self), batch_size)

    def step_size(self, batch_size: int, step: int) -> int:
        return size_of(len(self), self.steps(batch_size), step)

    def test_steps(self, ranks: int) -> int:
        return steps_of(size_of(len(self), ranks, 0), self.test_batch_size)

    def shuffled(self, batch_size: int, seed: int, epoch: int, first_step: int, part: Part) -> list[Tensor]:
        """Of each batch of an epoch this process's part: numbers among these images, ``[n]`` int64."""
        wholes = torch.randperm(len(self), generator=epoch_generator(seed, epoch)).tensor_split(self.steps(batch_size))
        return [whole.tensor_split(part.ranks)[part.rank] for whole in wholes[first_step:]]

    @abstractmethod
    def row_labels(self) -> np.ndarray:
        """The label of every image, ``[N]`` int64."""

    @abstractmethod
    def at(self, rows: np.ndarray) -> Self:
        """Some of the images, by their numbers among these."""

    def stratified(self, count: int) -> tuple[Self, Self]:
        """``count`` images with every class in proportion, the same ones at every call, and the rest.

        Raises:
            SettingsError: fewer images than classes on either side.
        """
        if count == len(self):
            return self, self.at(np.arange(0))
        chosen, rest = stratified_rows(self.row_labels(), count)
        return self.at(chosen), self.at(rest)

    def folds(self, count: int) -> list[tuple[Self, Self]]:
        """``count`` ways to divide them, classes in proportion: those to fit on and those to validate on.

        Every image is validated on once. The folds are the same at every call.
        """
        rows = stratified_folds(self.row_labels(), count)
        return [(self.at(fitted), self.at(validated)) for fitted, validated in rows]


def epoch_generator(seed: int, epoch: int) -> torch.Generator:
    """Draws an epoch's order and, after it, what else the epoch draws."""
    return torch.Generator().manual_seed(seed * 1_000_003 + epoch)


def steps_of(images: int, batch_size: int) -> int:
    """How many batches of at most ``batch_size`` an epoch has."""
    return -(-images // batch_size)


def size_of(count: int, parts: int, place: int) -> int:
    """The size of one of the nearly equal parts into which ``Tensor.tensor_split`` cuts ``count`` rows."""
    return count // parts + (place < count % parts)
