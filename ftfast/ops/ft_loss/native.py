"""The loss through ftfast._C on the CPU: allocates the results and hands addresses and strides to C++.

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

Described = tuple[int, int, tuple[int, ...]]


def _describe(factor: Tensor) -> Described:
    return factor.data_ptr(), _DTYPE_CODES[factor.dtype], factor.stride()


class LossPlan:
    """The loss of factors of one kind on the CPU, and its gradients; see :class:`ftfast.backends.LossPlan`.

    The factors are still in cache when the gradient is written in forward, which spares reading them again.
    """

    def __init__(self, student: Tensor, teacher: Tensor, p: int, reduction: str, eps: float) -> None:
        self.shape, self.device = student.shape, student.device
        self.number = compute_dtype(student, teacher)
        self.p, self.reduction, self.eps = p, reduction, eps
        self.mean_of_rows = reduction != "none"
        self.loss_shape = () if self.mean_of_rows else self.shape[:1]
        self.divisor = reduction_divisor(self.shape[0], self.shape[1:].numel(), p=p, reduction=reduction)
        self.kind = (p, student.shape[1])

    @property
    def expected_upstream(self) -> float | None:
        """The number that upstream gradients have been lately; none of losses ``[N]``, which have one a sample."""
        return expected_upstream(self.kind) if self.mean_of_rows else None

    def _scale(self, weight: float | Tensor) -> float:
        return (weight.item() if isinstance(weight, Tensor) else weight) / self.divisor

    def _forward(
        self,
        student: Tensor,
        teacher: Tensor,
        gradient: Described | None,
        weight: float | Tensor,
        upstream: float,
    ) -> tuple[Tensor, Tensor]:
        statistics = torch.empty((5, self.shape[0]), dtype=self.number, device=self.device)
        loss = torch.empty(self.loss_shape, dtype=self.number, device=self.device)
        extension().ft_loss_forward(
            self.shape,
            _describe(student),
            _describe(teacher),
            gradient,
            loss.data_ptr(),
            statistics.data_ptr(),
            self.p,
            self.mean_of_rows,
            self.eps,
            self._scale(weight),
            upstream,
            torch.get_num_threads(),
        )
        return loss, statistics

    def forward(self, student: Tensor, teacher: Tensor, weight: float | Tensor) -> tuple[Tensor, Tensor]:
        return self._forward(student, teacher, None, weight, 1.0)

    def forward_with_gradient(
        self, student: Tensor, teacher: Tensor, weight: float | Tensor, upstream: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """``(loss, statistics, gradient)``: the student's gradient as :meth:`backward` gives it for ``upstream``."""
        gradient = torch.empty_like(student)
        return *self._forward(student, teacher, _describe(gradient), weight, upstream), gradient

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
        extension().ft_loss_backward(
            self.shape,
            _describe(student),
            _describe(teacher),
            None if for_student is None else _describe(for_student),
            None if for_teacher is None else _describe(for_teacher),
            statistics.data_ptr(),
            upstream.data_ptr(),
            upstream.stride(0) if upstream.dim() else 0,
            self.p,
            self._scale(weight),
            torch.get_num_threads(),
        )
        return for_student, for_teacher
