"""What the ways to compute a head are given besides its features."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ftfast.backends import Options
from ftfast.ops.ft_head.stack import Stack

SEPARATE = "separate"


class Plan(NamedTuple):
    """How a head is computed, and why so, in words for users.

    Attributes:
        kernel: "separate" for torch's modules and the loss alone, else a way of the backend's to compute it whole.
        backend: "native" or "triton"; what computes the loss where the kernel is "separate".
        dtype: of the maps between the convolutions.
    """

    kernel: str
    backend: str
    dtype: torch.dtype
    reason: str


class Head(NamedTuple):
    """What a call computes besides its features; ``held`` as :func:`ftfast.ops.ft_head.function.run` takes it."""

    plan: Plan
    translator: Stack
    paraphraser: Stack | None
    options: Options
    held: int | None = None


class Kept(NamedTuple):
    """What a forward pass leaves to its backward: the tensors that autograd keeps, and what they were computed with."""

    tensors: Sequence[Tensor] = ()
    plan: Any = None
