"""The convolutions of a translator or a frozen paraphraser as tensors, and what is prepared once from frozen ones."""

import weakref
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from ftfast.ops.fingerprint import fingerprint


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

    def parameters(self) -> list[Tensor]:
        """``[weight, bias, weight, ...]``."""
        return [part for pair in zip(self.weights, self.biases, strict=True) for part in pair]

    def tensors(self) -> tuple[Tensor, ...]:
        """Everything that the stack's result depends on besides its input."""
        of_norms = [part for norm in self.norms for part in norm[:4] if part is not None]
        return (*self.weights, *self.biases, *of_norms)

    def folded(self) -> list[tuple[Tensor, Tensor]]:
        """``(weight, bias)`` of each convolution with its batch norm folded in, in float32 where there is one."""
        pairs = list(zip(self.weights, self.biases, strict=True))
        if not self.norms:
            return pairs
        with torch.no_grad():
            return [_folded(*pair, norm) for pair, norm in zip(pairs, self.norms, strict=True)]


def _folded(weight: Tensor, bias: Tensor, norm: BatchNorm) -> tuple[Tensor, Tensor]:
    factor = torch.rsqrt(norm.variance.float() + norm.eps)
    if norm.weight is not None:
        factor = factor * norm.weight.float()
    shift = (bias.float() - norm.mean.float()) * factor
    if norm.bias is not None:
        shift = shift + norm.bias.float()
    return weight.float() * factor.view(-1, 1, 1, 1), shift


class _Prepared(NamedTuple):
    tensors: tuple["weakref.ref[Tensor]", ...]
    # While a weak reference to it lives, a storage's address goes to no other storage.
    storages: tuple[StorageWeakRef, ...]
    state: tuple[Any, ...]
    result: Any


_prepared: dict[tuple[Any, ...], _Prepared] = {}


def _state(stack: Stack, tensors: tuple[Tensor, ...], held: int | None) -> tuple[Any, ...] | None:
    """What changes whenever the stack's result does; None where nothing that is cheap to read tells."""
    versions: list[Any] = []
    if held is not None and not any(tensor.is_inference() for tensor in tensors):  # these have no counter
        for tensor in tensors:
            versions += (tensor._version, tensor.untyped_storage()._cdata, tensor.storage_offset())
    elif (contents := fingerprint(tensors)) is not None:
        versions.append(contents)
    else:
        return None
    layouts = tuple((tensor.dtype, tensor.shape, tensor.stride()) for tensor in tensors)
    return (held, *(norm.eps for norm in stack.norms)), layouts, tuple(versions)


def _forget(prepared: dict[tuple[Any, ...], _Prepared], place: tuple[Any, ...], _: object) -> None:
    """Takes the table along: at the end of a process this module's names may be gone before its tensors."""
    prepared.pop(place, None)


def prepare_once(stack: Stack, held: int | None, key: tuple[Any, ...], prepare: Callable[[], Any]) -> Any:
    """``prepare()``, kept until a tensor of the stack or an eps changes, is replaced or is gone.

    On a CPU the contents are read at each call, far faster than the convolutions read them. To read them on a GPU
    would cost what it costs to prepare them, so that is done at each call. Where they are held, torch's version
    counters are read instead, which a write through ``.data`` passes by.
    """
    if held is None and stack.weights[0].is_cuda:
        return prepare()
    tensors = stack.tensors()
    state = _state(stack, tensors, held)
    place = (id(tensors[0]), *key)
    found = None if state is None else _prepared.get(place)
    if found is not None and found.state == state:
        alive = zip(found.tensors, tensors, strict=True)
        if all(reference() is tensor for reference, tensor in alive):
            return found.result
    with torch.no_grad():
        result = prepare()
    if tensors[0].is_cuda and torch.cuda.is_current_stream_capturing():
        return result  # which nothing has computed yet, and every replay of the graph will anew
    if state is not None:
        first = weakref.ref(tensors[0], partial(_forget, _prepared, place))
        references = (first, *(weakref.ref(tensor) for tensor in tensors[1:]))
        storages = tuple(StorageWeakRef(tensor.untyped_storage()) for tensor in tensors)
        _prepared[place] = _Prepared(references, storages, state, result)
    return result
