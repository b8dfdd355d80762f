"""Tensor descriptors: what the copy engine of compute capability 9.0 and later reads and writes tiles by."""

from functools import cache
from inspect import signature
from typing import Any

from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .launch import INTERPRETED

ALIGNMENT = 16


def can_describe(*maps: Tensor) -> bool:
    """Whether contiguous tensors start, and their rows too, at multiples of 16 bytes."""
    return all(
        each.data_ptr() % ALIGNMENT == 0 and each.shape[-1] * each.element_size() % ALIGNMENT == 0 for each in maps
    )


@cache
def _can_round() -> bool:
    # In the interpreter float32 products are exact.
    return "round_f32_to_tf32" in signature(TensorDescriptor).parameters and not INTERPRETED.value


def describe(matrix: Tensor, *block: int, rounded: bool = False) -> Any:
    """A descriptor of a contiguous tensor.

    Args:
        matrix: each of its sizes at least 1, and :func:`can_describe` of it.
        block: the sizes of a tile, powers of two.
        rounded: float32 numbers are rounded to TF32 on their way, where the installed Triton can do that; tensor cores
            cut them off otherwise.
    """
    if rounded and matrix.element_size() == 4 and _can_round():
        return TensorDescriptor.from_tensor(matrix, list(block), round_f32_to_tf32=True)
    return TensorDescriptor.from_tensor(matrix, list(block))
