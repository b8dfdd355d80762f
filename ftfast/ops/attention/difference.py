"""The difference of two attention maps: attention transfer, and the form of Factor Transfer that RepDistiller has.

    m(f)[n, i] = mean over channels of f[n, :, i]^exponent        q = m / max(|m|_2, 1e-12)

    p = 1: mean over n and i of |q_s - q_t|                       p = 2: mean over n and i of (q_s - q_t)^2

The maps take nearly all the time: a read of both features, and a read of the student's and a write for its gradient.
What lies between is a factor transfer loss of H*W numbers a sample, and is computed as one. On a CPU and from 8 samples
on the student's gradient is written in forward, while a sample is in cache. Backward keeps the student's features and,
of the teacher, its map alone.

Zagoruyko and Komodakis, "Paying More Attention to Attention", ICLR 2017; HobbitLong's RepDistiller,
distiller_zoo/FT.py and AT.py.
"""

from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ftfast import reference
from ftfast.dispatch import resolve
from ftfast.ops.attention.map import attention_map, dense, map_kernels
from ftfast.ops.differentiable import gradients_through_torch
from ftfast.ops.ft_loss.expected_upstream import expected_upstream, note_upstream
from ftfast.ops.ft_loss.function import needs_torch_operators, run
from ftfast.ops.maps import no_autocast
from ftfast.ops.memory import is_batched, save, saved

_EPS = 1e-12
# So many samples are enough to share among threads, each whole. How many threads there are must not change a bit.
_SAMPLES_TO_SHARE = 8


def attention_difference(
    student_features: Tensor, teacher_features: Tensor, *, exponent: float = 2, p: float = 1, backend: str = "auto"
) -> Tensor:
    """The mean over N*H*W of ``|q_s - q_t|`` for p=1, else of ``(q_s - q_t) ** p``, without a root.

    Args:
        student_features, teacher_features: ``[N, C, H, W]``, float64, float32, bfloat16 or float16, any strides; C may
            differ. Where H differs, the larger map is pooled to squares of the other's height.
        exponent: of the features; 1 to 4 have kernels.
        p: of the difference; 1 and 2 have kernels.
        backend: as :func:`ftfast.ft_loss`.

    Returns:
        0-d, float64 where a map is float64, else float32, inside autocast too.

    Raises:
        TypeError: maps that are no floating-point tensors, or an exponent or p that is no number.
        ValueError: maps of other dimensions, samples or devices, of unlike widths after pooling.
    """
    reference.check_attention(student_features, teacher_features, exponent, p)
    wanted = resolve(backend)
    if wanted == "reference" or p not in (1, 2) or needs_torch_operators(student_features, teacher_features):
        return reference.attention_difference(student_features, teacher_features, exponent=exponent, p=p)
    size = min(student_features.shape[2], teacher_features.shape[2])
    student, teacher = (_pooled(side, size) for side in (student_features, teacher_features))
    teacher_map = attention_map(teacher, exponent, wanted)
    kernels = _kernels_of_both(student, teacher_map, exponent, wanted)
    if kernels is None:
        return _difference_of_maps(attention_map(student, exponent, wanted), teacher_map, p, backend)
    how = How(int(exponent), int(p), kernels)
    if torch.is_grad_enabled() and student.requires_grad:
        return AttentionDifferenceFunction.apply(student, teacher_map, how)
    return _compute(student, teacher_map, how, None)[0]


def _difference_of_maps(student_map: Tensor, teacher_map: Tensor, p: float, backend: str) -> Tensor:
    if p == 1:
        return run(student_map, teacher_map, p=1, reduction="mean", eps=_EPS, weight=1.0, backend=backend)
    lengths = run(student_map, teacher_map, p=2, reduction="none", eps=_EPS, weight=1.0, backend=backend)
    return lengths.square().mean() / teacher_map.shape[1]


def _kernels_of_both(student: Tensor, teacher_map: Tensor, exponent: float, backend: str) -> ModuleType | None:
    """Whose kernels compute the student's map, the loss and the gradient in one; None where nobody's do."""
    if torch.compiler.is_compiling() or student.shape[0] < _SAMPLES_TO_SHARE:
        return None
    if teacher_map.requires_grad or teacher_map.dtype != torch.float32:
        return None
    # What was made under inference_mode cannot be saved.
    kernels = None if student.is_inference() else map_kernels(student, exponent, backend)
    return kernels if hasattr(kernels, "attention_difference") else None


class How(NamedTuple):
    """How two attention maps are compared."""

    exponent: int
    p: int
    kernels: Any


class AttentionDifferenceFunction(torch.autograd.Function):
    """Keeps the student's features and the teacher's map; beside lies the gradient for the upstream one expected."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher_map: Tensor, how: How) -> Tensor:
        ctx.how, ctx.kind = how, ("attention", how.p, student.shape[1])
        ctx.written_for = expected_upstream(ctx.kind)
        save(ctx, student, teacher_map)
        loss, ctx.gradient = _compute(student, teacher_map, how, ctx.written_for)
        return loss

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, None, None]:
        how, gradient = ctx.how, ctx.gradient
        runs_again = torch._C._autograd._get_current_graph_task_keep_graph()
        # The graph may be run again, and whoever receives the gradient may write to it.
        if not runs_again:
            ctx.gradient = None
        if torch.is_grad_enabled() or is_batched(upstream):
            student, teacher_map = saved(ctx)

            def difference(student: Tensor) -> Tensor:
                student_map = reference.attention_map(student, how.exponent)
                return _difference_of_maps(student_map, teacher_map, how.p, "reference")

            return gradients_through_torch(difference, (student,), (True,), upstream)[0], None, None
        number = upstream.item()
        if gradient is not None and number == ctx.written_for:
            return gradient.clone() if runs_again else gradient, None, None
        note_upstream(ctx.kind, number)
        student, teacher_map = saved(ctx)
        return _compute(student, teacher_map, how, number)[1], None, None


def _compute(student: Tensor, teacher_map: Tensor, how: How, upstream: float | None) -> tuple[Tensor, Tensor | None]:
    """The loss, and the gradient for an upstream gradient where there is one."""
    found: tuple[Tensor, Tensor | None] = how.kernels.attention_difference(
        dense(student), teacher_map, how.exponent, how.p, _EPS, upstream
    )
    return found


def _pooled(features: Tensor, height: int) -> Tensor:
    if features.shape[2] == height:
        return features
    wide = features if features.dtype == torch.float64 else features.float()
    with no_autocast(features.device.type):
        return F.adaptive_avg_pool2d(wide, (height, height))
