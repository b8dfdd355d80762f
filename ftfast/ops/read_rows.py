"""Rows of files, gathered into one tensor."""

import errno
import os
from contextlib import suppress

import numpy as np
import torch
from torch import Tensor

from ftfast.extension import load_extension
from ftfast.ops.memory import lies_in_memory


class RowError(OSError):
    """A row that could not be read; ``errno`` is ENODATA where its file ended before it did.

    Attributes:
        row: its number.
    """

    def __init__(self, row: int, number: int) -> None:
        super().__init__(number, os.strerror(number))
        self.row = row


def read_rows(descriptors: np.ndarray, offsets: np.ndarray, out: Tensor) -> None:
    """``out[i]`` becomes the bytes from ``offsets[i]`` of the open file ``descriptors[i]``; the disk is asked for all.

    With the extension it is one call without Python's lock: hundreds of short ones would hold up the thread whose step
    it reads for, which needs the lock for its own.

    Args:
        descriptors, offsets: ``[N]`` integers; offsets are at least 0.
        out: ``[N, ...]``, contiguous, on the CPU, any dtype.

    Raises:
        ValueError: another number of rows, or memory with gaps or of another device.
        RowError: the first row that cannot be read.
    """
    if not len(descriptors) == len(offsets) == len(out) or np.ndim(descriptors) != 1 or np.ndim(offsets) != 1:
        raise ValueError(
            f"out has {len(out)} rows, and descriptors and offsets are {np.shape(descriptors)} and "
            f"{np.shape(offsets)}; give one of each for every row."
        )
    if out.device.type != "cpu" or not out.is_contiguous():
        raise ValueError(f"out is on {out.device} with strides {out.stride()}; it takes contiguous memory of the CPU.")
    if not out.numel():
        return
    if not lies_in_memory(out):
        raise ValueError("out is a lazily negated view, or has no memory; it takes memory that holds its numbers.")
    row_bytes = out.nbytes // len(out)
    extension, _ = load_extension()
    if extension is None:
        _read_by_python(descriptors, offsets, out, row_bytes)
        return
    # Kept by their names until the call is over.
    files = np.ascontiguousarray(descriptors, dtype=np.int32)
    starts = np.ascontiguousarray(offsets, dtype=np.int64)
    row, number = extension.read_rows(files.ctypes.data, starts.ctypes.data, len(out), row_bytes, out.data_ptr())
    if row >= 0:
        raise RowError(row, number or errno.ENODATA)


def _read_by_python(descriptors: np.ndarray, offsets: np.ndarray, out: Tensor, row_bytes: int) -> None:
    places = list(zip(descriptors.tolist(), offsets.tolist(), strict=True))
    if hasattr(os, "posix_fadvise"):
        for descriptor, offset in places:
            with suppress(OSError):
                os.posix_fadvise(descriptor, offset, row_bytes, os.POSIX_FADV_WILLNEED)
    buffer = out.view(torch.uint8).reshape(len(out), -1).numpy()
    for row, (descriptor, offset) in enumerate(places):
        try:
            count = os.preadv(descriptor, [buffer[row]], offset)
        except OSError as error:
            raise RowError(row, error.errno or errno.EIO) from None
        if count != row_bytes:
            raise RowError(row, errno.ENODATA)
