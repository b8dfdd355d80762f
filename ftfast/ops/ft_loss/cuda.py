"""The loss through ftfast._C on a CUDA device: allocates the results, brings both factors into one order, launches.

The arguments were checked by function.py; the extension trusts what it gets. The kernels walk over samples that
are one run of memory each, in the order of the student's: any common strides of that kind cost nothing. A factor that
lies otherwise is copied first, in forward and again in backward, since only the factors themselves are kept between
the two. So are float32 and 16-bit factors that meet a float64 one.
"""

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ftfast.extension import extension
from ftfast.kernels.device import arrival_counters, current_stream, is_current
from ftfast.kernels.loss_numbers import norm_floor
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


def _read_as(dtype: torch.dtype, number: torch.dtype) -> torch.dtype:
    """float64 sums take float64 factors alone: other pairs of float64 are rare, and each would be a kernel more."""
    return number if number == torch.float64 else dtype


class Side:
    """A factor of one kind, or its gradient, and how the kernels get at it."""

    def __init__(
        self, shape: torch.Size, strides: tuple[int, ...], order: Order, dtype: torch.dtype, read_as: torch.dtype
    ):
        self.shape, self.dtype = shape, read_as
        self.copied = dtype != read_as or _order(shape, strides) != order
        run = 1
        in_order = [1] * len(shape)
        for axis in reversed(order):
            in_order[axis] = run
            run *= shape[axis]
        in_order[0] = run
        self.strides = tuple(in_order)
        # Where there is one sample alone, its stride may be anything.
        self.row = 0 if shape[0] == 1 else run if self.copied else strides[0]
        self.code = _DTYPE_CODES[read_as]

    def empty(self, device: torch.device) -> Tensor:
        """Memory in the kernels' order."""
        return torch.empty_strided(self.shape, self.strides, dtype=self.dtype, device=device)

    def place(self, result: Any) -> Any:
        """Where the kernel writes a result, which may be None: there, or in memory of the kernels' order."""
        return self.empty(result.device) if self.copied and result is not None else result

    def rows(self, laid: Tensor) -> Rows:
        """As the extension takes it, from a tensor in the kernels' order."""
        return laid.data_ptr(), self.code, self.row


class LossPlan:
    """The loss of CUDA factors of one kind, and its gradients; see :class:`ftfast.backends.LossPlan`."""

    expected_upstream = None

    def __init__(self, student: Tensor, teacher: Tensor, p: int, reduction: str, eps: float) -> None:
        shape, self.device = student.shape, student.device
        self.samples, self.size = shape[0], shape[1:].numel()
        self.number = compute_dtype(student, teacher)
        self.p, self.reduction, self.eps = p, reduction, eps
        self.per_sample = reduction == "none"
        self.loss_shape = (self.samples,) if self.per_sample else ()
        self.floor = norm_floor(eps, self.number)
        self.divisor = reduction_divisor(self.samples, self.size, p=p, reduction=reduction)
        # The order that takes the fewest copies: the student's, or the teacher's where the student's has gaps.
        orders = [_order(shape, factor.stride()) for factor in (student, teacher)]
        in_turn = tuple(axis for axis in range(1, len(shape)) if shape[axis] != 1)
        order = next((each for each in orders if each is not None), in_turn)
        kinds = [(factor, _read_as(factor.dtype, self.number)) for factor in (student, teacher)]
        self.student, self.teacher = (Side(shape, each.stride(), order, each.dtype, read) for each, read in kinds)
        self.student_gradient, self.teacher_gradient = (
            Side(shape, torch.empty_like(each, device="meta").stride(), order, each.dtype, read) for each, read in kinds
        )

    def _read(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        """Both factors as the kernels take them: themselves, or copies."""
        if self.student.copied:
            student = self.student.empty(self.device).copy_(student)
        if self.teacher.copied:
            teacher = self.teacher.empty(self.device).copy_(teacher)
        return student, teacher

    def _scale(self, weight: float | Tensor) -> tuple[float, Tensor | None]:
        """The scale as a number, and the weight where the kernel has to read it."""
        if not isinstance(weight, Tensor):
            return weight / self.divisor, None
        if weight.device != self.device:
            return weight.item() / self.divisor, None
        return 1.0 / self.divisor, weight.to(self.number)

    def forward(self, student: Tensor, teacher: Tensor, weight: float | Tensor) -> tuple[Tensor, Tensor]:
        if not is_current(self.device):
            with torch.cuda.device(self.device):
                return self.forward(student, teacher, weight)
        student, teacher = self._read(student, teacher)
        scale, weight_tensor = self._scale(weight)
        loss = torch.empty(self.loss_shape, dtype=self.number, device=self.device)
        statistics = torch.empty((5, self.samples), dtype=self.number, device=self.device)
        extension().ft_loss_cuda_forward(
            self.student.rows(student),
            self.teacher.rows(teacher),
            self.samples,
            self.size,
            self.p,
            self.per_sample,
            self.floor,
            scale,
            0 if weight_tensor is None else weight_tensor.data_ptr(),
            loss.data_ptr(),
            statistics.data_ptr(),
            0 if self.per_sample else arrival_counters(self.device).data_ptr(),
            self.device.index or 0,
            current_stream(self.device),
        )
        return loss, statistics

    def backward(
        self,
        student: Tensor,
        teacher: Tensor,
        statistics: Tensor,
        upstream: Tensor,
        weight: float | Tensor,
        needed: tuple[bool, bool],
    ) -> tuple[Tensor | None, Tensor | None]:
        if not is_current(self.device):
            with torch.cuda.device(self.device):
                return self.backward(student, teacher, statistics, upstream, weight, needed)
        for_student: Any = torch.empty_like(student) if needed[0] else None
        for_teacher: Any = torch.empty_like(teacher) if needed[1] else None
        student_result, teacher_result = (
            self.student_gradient.place(for_student),
            self.teacher_gradient.place(for_teacher),
        )
        student, teacher = self._read(student, teacher)
        scale, weight_tensor = self._scale(weight)
        if upstream.dtype != self.number:
            upstream = upstream.to(self.number)
        extension().ft_loss_cuda_backward(
            self.student.rows(student),
            self.teacher.rows(teacher),
            None if student_result is None else self.student_gradient.rows(student_result),
            None if teacher_result is None else self.teacher_gradient.rows(teacher_result),
            self.samples,
            self.size,
            self.p,
            scale,
            0 if weight_tensor is None else weight_tensor.data_ptr(),
            statistics.data_ptr(),
            upstream.data_ptr(),
            upstream.stride(0) if upstream.dim() else 0,
            self.device.index or 0,
            current_stream(self.device),
        )
        for result, computed in ((for_student, student_result), (for_teacher, teacher_result)):
            if result is not computed:
                result.copy_(computed)
        return for_student, for_teacher
