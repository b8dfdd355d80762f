"""ft_loss and FTLoss: the factor transfer loss on the fastest backend there is."""

from typing import TYPE_CHECKING

from torch import Tensor, nn

from ftfast.arguments import Backend, Reduction, check_options
from ftfast.dispatch import resolve
from ftfast.ops.ft_loss.function import run


def ft_loss(
    student_factor: Tensor,
    teacher_factor: Tensor,
    *,
    p: int = 1,
    reduction: Reduction = "mean",
    eps: float = 1e-12,
    weight: float | Tensor = 1.0,
    backend: Backend = "auto",
) -> Tensor:
    """The p-norm between two normalised factors, section 3.2 of the paper.

    Per sample ``a = s / max(|s|_2, eps)`` and ``b = t / max(|t|_2, eps)``; ``l`` is the p-norm of ``a - b``.

    Args:
        student_factor: ``[N, ...]``, float64, float32, bfloat16 or float16, any strides; the rest of the shape holds
            D numbers a sample.
        teacher_factor: the same shape and device; the dtype may differ, and may also be int8 or float8_e4m3fn
            (only a factor's direction counts, so no scale is needed). It gets a gradient where it requires one.
        p: 1 (the official code) or 2.
        reduction: ``"mean"`` divides the sum of ``l`` by ``N * D`` for p=1 and by ``N`` for p=2, as the official
            code, mmrazor and torchdistill; ``"batchmean"`` divides by ``N``, the paper's formula; ``"sum"`` does not
            divide; ``"none"`` returns ``l: [N]``.
        eps: the floor of a norm, at least 0.
        weight: multiplies the loss; a float, or a 0-d tensor that may change every step.
        backend: ``"auto"``, ``"reference"``, ``"native"`` or ``"triton"``; the default is taken from FTFAST_BACKEND.

    Returns:
        0-d (``[N]`` for ``"none"``): float64 where a factor is float64, else float32, inside autocast too. N=0 gives
        what torch's mean and sum give: nan and 0.

    Raises:
        TypeError: a factor of another type or dtype.
        ValueError: unlike shapes or devices, or an option outside the lists above.
        RuntimeError: an explicit backend that cannot run here.
    """
    return run(student_factor, teacher_factor, p=p, reduction=reduction, eps=eps, weight=weight, backend=backend)


class FTLoss(nn.Module):
    """:func:`ft_loss` as a module: ``FTLoss()(student_factor, teacher_factor)``.

    Args:
        p, reduction, eps, weight, backend: as :func:`ft_loss`; plain attributes, which may be changed at any step.
    """

    def __init__(
        self,
        p: int = 1,
        reduction: Reduction = "mean",
        eps: float = 1e-12,
        weight: float | Tensor = 1.0,
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        check_options(p=p, reduction=reduction, eps=eps, weight=weight)
        resolve(backend)
        self.p = p
        self.reduction: Reduction = reduction
        self.eps = eps
        self.weight = weight
        self.backend: Backend = backend

    def forward(self, student_factor: Tensor, teacher_factor: Tensor) -> Tensor:
        """The loss of ``student_factor`` and ``teacher_factor``, both ``[N, ...]``."""
        return run(
            student_factor,
            teacher_factor,
            p=self.p,
            reduction=self.reduction,
            eps=self.eps,
            weight=self.weight,
            backend=self.backend,
        )

    if TYPE_CHECKING:  # torch's own says that a call gives anything

        def __call__(self, student_factor: Tensor, teacher_factor: Tensor) -> Tensor: ...

    def extra_repr(self) -> str:
        return (
            f"p={self.p}, reduction={self.reduction!r}, eps={self.eps}, weight={self.weight}, backend={self.backend!r}"
        )
