"""The loss through ftfast._C on the CPU: allocates the results and hands addresses to C++.

The arguments were checked by ftfast.ops.ft_loss.function; the extension trusts what it gets.
"""

import torch
from torch import Tensor

from ftfast.extension import extension
from ftfast.ops.ft_loss.expected_upstream import expected_upstream, note_upstream
from ftfast.reference import compute_dtype, reduction_divisor

_DTYPE_CODES = {
    torch.float64: 0,
    torch.float32: 1,
    torch.bfloat16: 2,
    torch.float16: 3,
    torch.int8: 4,
    torch.float8_e4m3fn: 5,
}


class LossPlan:
    """The loss of factors of one kind on the CPU, and its gradients; see :class:`ftfast.backends.LossPlan`.

    The factors are still in cache when the gradient is written in forward, which spares reading them again.
    """

    def __init__(self, student: Tensor, teacher: Tensor, p: int, reduction: str, eps: float) -> None:
        shape, number = student.shape, compute_dtype(student, teacher)
        self.p, self.reduction, self.eps = p, reduction, eps
        self.mean_of_rows = reduction != "none"
        self.divisor = reduction_divisor(shape[0], shape[1:].numel(), p=p, reduction=reduction)
        self.kind = ("factors", p, shape[1])
        # Results are made like these: that is faster than to name their shape, dtype and device.
        self.loss = student.new_empty(() if self.mean_of_rows else shape[:1], dtype=number)
        self.statistics = student.new_empty((5, shape[0]), dtype=number)
        described = [
            (_DTYPE_CODES[factor.dtype], factor.stride(), torch.empty_like(factor).stride())
            for factor in (student, teacher)
        ]
        self.problem = extension().LossProblem(shape, *described[0], *described[1], p, self.mean_of_rows, eps)

    @property
    def expected_upstream(self) -> float | None:
        """The number that upstream gradients have been lately; none of losses ``[N]``, which have one a sample."""
        return expected_upstream(self.kind) if self.mean_of_rows else None

    def _scale(self, weight: float | Tensor) -> float:
        return (weight.item() if isinstance(weight, Tensor) else weight) / self.divisor

    def forward(self, student: Tensor, teacher: Tensor, weight: float | Tensor) -> tuple[Tensor, Tensor]:
        statistics = torch.empty_like(self.statistics)
        return self._forward(student, teacher, 0, statistics.data_ptr(), weight, 1.0), statistics

    def forward_with_gradient(
        self, student: Tensor, teacher: Tensor, weight: float | Tensor, upstream: float
    ) -> tuple[Tensor, Tensor]:
        """``(loss, gradient)``: the student's gradient as :meth:`backward` gives it for ``upstream``."""
        gradient = torch.empty_like(student)
        return self._forward(student, teacher, gradient.data_ptr(), 0, weight, upstream), gradient

    def _forward(
        self, student: Tensor, teacher: Tensor, gradient: int, statistics: int, weight: float | Tensor, upstream: float
    ) -> Tensor:
        """The loss; gradient and statistics, where they are wanted, go to these addresses."""
        loss = torch.empty_like(self.loss)
        self.problem.forward(
            student.data_ptr(),
            teacher.data_ptr(),
            gradient,
            loss.data_ptr(),
            statistics,
            self._scale(weight),
            upstream,
            torch.get_num_threads(),
        )
        return loss

    def backward(
        self,
        student: Tensor,
        teacher: Tensor,
        statistics: Tensor,
        upstream: Tensor,
        weight: float | Tensor,
        needed: tuple[bool, bool],
    ) -> tuple[Tensor | None, Tensor | None]:
        if self.mean_of_rows and upstream.dim() == 0:
            note_upstream(self.kind, upstream.item())
        for_student = torch.empty_like(student) if needed[0] else None
        for_teacher = torch.empty_like(teacher) if needed[1] else None
        self.problem.backward(
            student.data_ptr(),
            teacher.data_ptr(),
            0 if for_student is None else for_student.data_ptr(),
            0 if for_teacher is None else for_teacher.data_ptr(),
            statistics.data_ptr(),
            upstream.data_ptr(),
            upstream.stride(0) if upstream.dim() else 0,
            self._scale(weight),
            torch.get_num_threads(),
        )
        return for_student, for_teacher
