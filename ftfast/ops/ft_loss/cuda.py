"""The loss through ftfast._C on a CUDA device: allocates the results, brings both factors into one order, launches.

The arguments were checked by function.py; the extension trusts what it gets. The kernels walk over samples that
are one run of memory each, in the order of the student's: any common strides of that kind cost nothing. A factor that
lies otherwise is copied first, in forward and again in backward, since only the factors themselves are kept between
the two. So are float32 and 16-bit factors that meet a float64 one.
"""

from functools import lru_cache

import torch
from torch import Tensor

from ftfast.extension import extension
from ftfast.reference import compute_dtype, reduction_divisor

_DTYPE_CODES = {
    torch.float64: 0,
    torch.float32: 1,
    torch.bfloat16: 2,
    torch.float16: 3,
    torch.int8: 4,
    torch.float8_e4m3fn: 5,
}

Order = tuple[int, ...]
Rows = tuple[int, int, int]


@lru_cache(maxsize=4096)
def _order(shape: tuple[int, ...], strides: tuple[int, ...]) -> Order | None:
    """The sample's dimensions from the outermost in memory to the innermost; None where it is not one run of memory.

    Where two factors of one shape have the same order, their samples' elements lie in it alike.
    """
    axes = [axis for axis in range(1, len(shape)) if shape[axis] != 1]
    axes.sort(key=lambda axis: strides[axis], reverse=True)
    run = 1
    for axis in reversed(axes):
        if strides[axis] != run:
            return None
        run *= shape[axis]
    return tuple(axes)


def _common_order(student: Tensor, teacher: Tensor) -> Order:
    """The order that takes the fewest copies: the student's, or the teacher's where the student's has gaps."""
    for factor in (student, teacher):
        order = _order(factor.shape, factor.stride())
        if order is not None:
            return order
    return tuple(axis for axis in range(1, student.dim()) if student.shape[axis] != 1)


def _empty_in(order: Order, like: Tensor, dtype: torch.dtype) -> Tensor:
    strides, run = [1] * like.dim(), 1
    for axis in reversed(order):
        strides[axis] = run
        run *= like.shape[axis]
    strides[0] = run
    return torch.empty_strided(like.shape, strides, dtype=dtype, device=like.device)


def _read_as(factor: Tensor, number: torch.dtype) -> torch.dtype:
    """float64 sums take float64 factors alone: other pairs of float64 are rare, and each would be a kernel more."""
    return number if number == torch.float64 else factor.dtype


def _lies_in(order: Order, factor: Tensor, dtype: torch.dtype) -> bool:
    return factor.dtype == dtype and _order(factor.shape, factor.stride()) == order


def _lay(factor: Tensor, order: Order, number: torch.dtype) -> Tensor:
    """The factor as the kernels take it: itself, or a copy."""
    dtype = _read_as(factor, number)
    return factor if _lies_in(order, factor, dtype) else _empty_in(order, factor, dtype).copy_(factor)


def _rows(factor: Tensor) -> Rows:
    stride = factor.stride(0) if factor.shape[0] > 1 else 0
    return factor.data_ptr(), _DTYPE_CODES[factor.dtype], stride


def _weight(weight: float | Tensor, number: torch.dtype, device: torch.device) -> tuple[float, Tensor | None]:
    """The weight as a number to multiply the scale with, or as one that the kernel reads."""
    if not isinstance(weight, Tensor):
        return weight, None
    if weight.device == device:
        return 1.0, weight.to(number)
    return weight.item(), None


def _stream(device: torch.device) -> int:
    return torch.cuda.current_stream(device).cuda_stream


def ft_loss_forward(
    student: Tensor, teacher: Tensor, *, p: int, reduction: str, eps: float, weight: float | Tensor
) -> tuple[Tensor, Tensor]:
    """The loss of :func:`ftfast.ft_loss` and what its backward needs, in one launch.

    Args:
        student: ``[N, ...]`` with N >= 1 and D >= 1, float64, float32, bfloat16 or float16, on a CUDA device.
        teacher: the same shape and device; also int8 or float8_e4m3fn.
        p, reduction, eps, weight: as :func:`ftfast.ft_loss` takes them.

    Returns:
        The loss, 0-d (``[N]`` for "none"), and statistics ``[5, N]``: both reciprocal norms, ``<g, a>`` and
        ``<g, b>`` (0 where the norm is clamped), and ``l``. Both are float64 where an input is, else float32.
    """
    from ftfast.kernels.launch import arrival_counters, device_guard
    from ftfast.kernels.loss_terms import norm_floor

    number, order = compute_dtype(student, teacher), _common_order(student, teacher)
    samples, size, device = student.shape[0], student.numel() // student.shape[0], student.device
    student, teacher = _lay(student, order, number), _lay(teacher, order, number)
    factor, weight_tensor = _weight(weight, number, device)
    per_sample = reduction == "none"
    loss = torch.empty((samples,) if per_sample else (), dtype=number, device=device)
    statistics = torch.empty((5, samples), dtype=number, device=device)
    with device_guard(device):
        counter = None if per_sample else arrival_counters(device)
        extension().ft_loss_cuda_forward(
            _rows(student),
            _rows(teacher),
            samples,
            size,
            p,
            per_sample,
            norm_floor(eps, number),
            factor / reduction_divisor(samples, size, p=p, reduction=reduction),
            0 if weight_tensor is None else weight_tensor.data_ptr(),
            loss.data_ptr(),
            statistics.data_ptr(),
            0 if counter is None else counter.data_ptr(),
            device.index or 0,
            _stream(device),
        )
    return loss, statistics


def ft_loss_backward(
    student: Tensor,
    teacher: Tensor,
    statistics: Tensor,
    upstream: Tensor,
    *,
    p: int,
    reduction: str,
    weight: float | Tensor,
    student_gradient: bool,
    teacher_gradient: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of :func:`ft_loss_forward`, both in one launch where both are asked for.

    Args:
        student, teacher, p, reduction, weight: as forward got them.
        statistics: as forward returned it.
        upstream: the gradient of the loss, 0-d, or ``[N]`` with any stride for "none".
        student_gradient, teacher_gradient: which gradients to compute, one at least.

    Returns:
        The gradients, each with the dtype of its factor and the strides of ``torch.empty_like``, or None.
    """
    from ftfast.kernels.launch import device_guard

    number, order = statistics.dtype, _common_order(student, teacher)
    samples, size, device = student.shape[0], student.numel() // student.shape[0], student.device
    results: list[Tensor | None] = []
    written: list[Tensor | None] = []
    for factor, asked in ((student, student_gradient), (teacher, teacher_gradient)):
        result = torch.empty_like(factor) if asked else None
        results.append(result)
        dtype = _read_as(factor, number)
        direct = result is None or _lies_in(order, result, dtype)
        written.append(result if direct else _empty_in(order, factor, dtype))
    student, teacher = _lay(student, order, number), _lay(teacher, order, number)
    multiplier, weight_tensor = _weight(weight, number, device)
    upstream = upstream.to(number)
    with device_guard(device):
        extension().ft_loss_cuda_backward(
            _rows(student),
            _rows(teacher),
            None if written[0] is None else _rows(written[0]),
            None if written[1] is None else _rows(written[1]),
            samples,
            size,
            p,
            multiplier / reduction_divisor(samples, size, p=p, reduction=reduction),
            0 if weight_tensor is None else weight_tensor.data_ptr(),
            statistics.data_ptr(),
            upstream.data_ptr(),
            upstream.stride(0) if upstream.dim() else 0,
            device.index or 0,
            _stream(device),
        )
    for result, computed in zip(results, written, strict=True):
        if result is not None and computed is not result:
            assert computed is not None
            result.copy_(computed)
    return results[0], results[1]
