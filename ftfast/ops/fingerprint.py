"""Whether tensors still hold what they held, read from their contents at the speed of memory."""

from collections.abc import Iterable

import torch
from torch import Tensor

from ftfast.extension import load_extension


def fingerprint(tensors: Iterable[Tensor]) -> int | None:
    """A number of 64 bits that changes with any byte of the tensors, whoever wrote it.

    Torch's version counters pass by what is written through ``.data``, numpy or a collective.

    Returns:
        None where that cannot be read: a tensor that is not plain memory of the CPU, or no extension.
    """
    extension, _ = load_extension()
    dense = []
    for tensor in tensors:
        if extension is None or tensor.device.type != "cpu" or tensor.layout != torch.strided:
            return None
        if type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__:
            return None  # what it holds is elsewhere
        plain = tensor.detach().resolve_conj().resolve_neg()
        is_dense = plain.is_contiguous() or plain.is_contiguous(memory_format=torch.channels_last)
        dense.append(plain if is_dense else plain.contiguous())
    if extension is None:
        return None
    spans = [number for tensor in dense for number in (tensor.data_ptr(), tensor.numel() * tensor.element_size())]
    return int(extension.fingerprint(tuple(spans), torch.get_num_threads()))
