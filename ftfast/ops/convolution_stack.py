"""The convolutions of a translator or a frozen paraphraser as tensors, and what is prepared once from frozen ones."""

import weakref
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef


class BatchNorm(NamedTuple):
    """A batch norm in eval: what it multiplies and adds follows from these."""

    weight: Tensor | None
    bias: Tensor | None
    mean: Tensor
    variance: Tensor
    eps: float


class Stack(NamedTuple):
    """Convolutions ``[K, C, 3, 3]`` with LeakyReLU after each; norms, where there are any, in eval."""

    weights: tuple[Tensor, ...]
    biases: tuple[Tensor, ...]
    negative_slope: float
    norms: tuple[BatchNorm, ...] = ()

    def tensors(self) -> tuple[Tensor, ...]:
        """Everything that the stack's result depends on besides its input."""
        of_norms = [part for norm in self.norms for part in norm[:4] if part is not None]
        return (*self.weights, *self.biases, *of_norms)

    def folded(self) -> list[tuple[Tensor, Tensor]]:
        """``(weight, bias)`` of each convolution with its batch norm folded in, in float32 where there is one."""
        pairs = list(zip(self.weights, self.biases, strict=True))
        if not self.norms:
            return pairs
        folded = []
        for (weight, bias), norm in zip(pairs, self.norms, strict=True):
            factor = torch.rsqrt(norm.variance.float() + norm.eps)
            if norm.weight is not None:
                factor = factor * norm.weight.float()
            shift = (bias.float() - norm.mean.float()) * factor
            if norm.bias is not None:
                shift = shift + norm.bias.float()
            folded.append((weight.float() * factor.view(-1, 1, 1, 1), shift))
        return folded


class _Prepared(NamedTuple):
    tensors: tuple["weakref.ref[Tensor]", ...]
    # While a weak reference to it lives, a storage's address goes to no other storage.
    storages: tuple[StorageWeakRef, ...]
    versions: tuple[tuple[Any, ...], ...]
    result: Any


_prepared: dict[tuple[Any, ...], _Prepared] = {}


def _version(tensor: Tensor) -> tuple[Any, ...]:
    return tensor._version, tensor.untyped_storage()._cdata, tensor.dtype, tensor.storage_offset(), tensor.stride()


def _forget(prepared: dict[tuple[Any, ...], _Prepared], place: tuple[Any, ...], _: object) -> None:
    """Takes the table along: at the end of a process this module's names may be gone before its tensors."""
    prepared.pop(place, None)


def prepare_once(stack: Stack, key: tuple[Any, ...], prepare: Callable[[], Any]) -> Any:
    """``prepare()``, kept until a tensor of the stack is written to, replaced, moved or gone.

    Writes are seen through torch's version counters, which a write through ``.data`` passes by.
    """
    tensors = stack.tensors()
    if any(tensor.is_inference() for tensor in tensors):
        return prepare()  # these have no version counter
    versions = tuple(_version(tensor) for tensor in tensors)
    place = (id(tensors[0]), *key)
    found = _prepared.get(place)
    if found is not None and found.versions == versions:
        alive = zip(found.tensors, tensors, strict=True)
        if all(reference() is tensor for reference, tensor in alive):
            return found.result
    result = prepare()
    first = weakref.ref(tensors[0], partial(_forget, _prepared, place))
    references = (first, *(weakref.ref(tensor) for tensor in tensors[1:]))
    storages = tuple(StorageWeakRef(tensor.untyped_storage()) for tensor in tensors)
    _prepared[place] = _Prepared(references, storages, versions, result)
    return result
