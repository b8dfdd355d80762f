"""Tensors that lie in one allocation: where each begins is known beforehand, and a call allocates once for all of them.

Nothing of Triton is imported here.
"""

from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

# Bytes between the beginnings of two tensors at least, as torch's allocator leaves for CUDA.
ALIGNMENT = 512


class Piece(NamedTuple):
    """A contiguous tensor in an allocation, from ``offset`` bytes on."""

    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    def of(self, memory: Tensor) -> Tensor:
        """The tensor, a view of the allocation."""
        end = self.offset + prod(self.shape) * self.dtype.itemsize
        return memory[self.offset : end].view(self.dtype).view(self.shape)


class Layout:
    """The pieces of an allocation, one after the other; ``bytes`` is its size."""

    def __init__(self) -> None:
        self.bytes = 0

    def add(self, shape: tuple[int, ...], dtype: torch.dtype) -> Piece:
        """One more."""
        piece = Piece(self.bytes, shape, dtype)
        self.bytes += -(-prod(shape) * dtype.itemsize // ALIGNMENT) * ALIGNMENT
        return piece

    def empty(self, device: torch.device) -> Tensor:
        """Memory for all of them, uint8."""
        return torch.empty(self.bytes, dtype=torch.uint8, device=device)


class Place(NamedTuple):
    """What a pointer of a launch points to: one of the tensors that a call gives, or a piece of one."""

    tensor: int
    piece: Piece | None = None

    def of(self, tensors: tuple[Tensor, ...]) -> Tensor:
        """That tensor."""
        return tensors[self.tensor] if self.piece is None else self.piece.of(tensors[self.tensor])
