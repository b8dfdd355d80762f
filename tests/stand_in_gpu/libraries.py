"""cuBLAS, cuDNN and ftfast's CUDA C++ bring a CUDA runtime of their own: what is theirs is stood in for here.

Each of their operators becomes one launch on the current stream, and its results are whatever the memory holds.
"""

import ctypes
import warnings
from functools import cache
from typing import Any

import torch
from torch import Tensor


def launch(device: int, stream: int) -> None:
    """Gives a kernel to the stream with this handle; raises RuntimeError where a GPU would refuse it."""
    if error := _library().stand_in_launch(device, ctypes.c_void_p(stream)):
        raise RuntimeError(f"the stand-in GPU refuses a launch with error {error}.")


@cache
def _library() -> Any:
    return ctypes.CDLL(None)


def _launched(result: Tensor) -> Tensor:
    index = result.device.index
    with torch.cuda.device(index):
        launch(index, torch.cuda.current_stream(index).cuda_stream)
    return result


@cache
def _shape(x: torch.Size, weight: torch.Size, *options: Any) -> torch.Size:
    with torch.device("meta"):
        return torch.ops.aten.convolution(torch.empty(x), torch.empty(weight), None, *options).shape


def _convolution(x: Tensor, weight: Tensor, bias: Tensor | None, *options: Any) -> Tensor:
    frozen = [tuple(option) if isinstance(option, list) else option for option in options]
    shape = _shape(x.shape, weight.shape, *frozen)
    flat = x.is_contiguous(memory_format=torch.channels_last)
    layout = torch.channels_last if flat else torch.contiguous_format
    return _launched(torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=layout))


def _convolution_backward(
    upstream: Tensor, x: Tensor, weight: Tensor, bias_sizes: list[int] | None, *options: Any
) -> tuple[Tensor | None, ...]:
    results = (_launched(torch.empty_like(x)), torch.empty_like(weight), weight.new_empty(bias_sizes or 0))
    return tuple(result if need else None for result, need in zip(results, options[-1], strict=True))


def _mm(left: Tensor, right: Tensor) -> Tensor:
    return _launched(left.new_empty(left.shape[0], right.shape[1]))


def _addmm(bias: Tensor, left: Tensor, right: Tensor, **factors: float) -> Tensor:
    return _mm(left, right)


def _bmm(left: Tensor, right: Tensor) -> Tensor:
    return _launched(left.new_empty(*left.shape[:2], right.shape[2]))


def _dot(left: Tensor, right: Tensor) -> Tensor:
    return _launched(left.new_empty(()))


OPERATORS = {
    "convolution": _convolution,
    "convolution_backward": _convolution_backward,
    "mm": _mm,
    "addmm": _addmm,
    "bmm": _bmm,
    "dot": _dot,
}
_kept: list[torch.library.Library] = []


def install() -> None:
    """Called as torch is imported by a process that may have a stand-in GPU."""
    if _kept or not hasattr(_library(), "stand_in_launch"):
        return
    _kept.append(torch.library.Library("aten", "IMPL"))
    with warnings.catch_warnings(action="ignore"):  # torch says that it had others
        for name, function in OPERATORS.items():
            _kept[0].impl(name, function, "CUDA", allow_override=True)
    torch.backends.cudnn.enabled = False
    try:
        from ftfast import _C
    except ImportError:
        return
    if hasattr(_C, "ft_loss_cuda_problem"):
        _C.ft_loss_cuda_problem = lambda device: ""
        # Their last arguments are the device and the stream.
        _C.ft_loss_cuda_forward = _C.ft_loss_cuda_backward = lambda *arguments: launch(*arguments[-2:])
