"""Factor Transfer in plain PyTorch: the meaning that every backend is held to.

Kim, Park and Kwak, "Paraphrasing Complex Network: Network Compression via Factor Transfer", NeurIPS 2018
(arXiv 1802.04977). Everything here is differentiable as often as torch is, in any floating dtype.
"""

import math
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ftfast.arguments import check_factors, check_options


def compute_dtype(student_factor: Tensor, teacher_factor: Tensor) -> torch.dtype:
    """The dtype of the sums and of the loss: float64 where either factor is float64, else float32."""
    if torch.float64 in (student_factor.dtype, teacher_factor.dtype):
        return torch.float64
    return torch.float32


def ft_loss(
    student_factor: Tensor,
    teacher_factor: Tensor,
    *,
    p: int = 1,
    reduction: str = "mean",
    eps: float = 1e-12,
    weight: float | Tensor = 1.0,
) -> Tensor:
    """The factor transfer loss, section 3.2 of the paper, in the scaling of the official code.

    With ``a = s / max(|s|, eps)`` and ``b = t / max(|t|, eps)`` per sample, ``l_n`` is the p-norm of ``a_n - b_n``.

    Args:
        student_factor: ``[N, ...]``, float64, float32, bfloat16 or float16.
        teacher_factor: the same shape, a dtype of these, int8 or float8_e4m3fn.
        p: 1 or 2.
        reduction: ``"mean"`` divides the sum of ``l_n`` by ``N * D`` for ``p=1`` (``nn.L1Loss``) and by ``N`` for
            ``p=2``; ``"batchmean"`` divides by ``N``; ``"sum"`` does not divide; ``"none"`` returns ``[N]``.
        eps: the floor of a norm, as in :func:`torch.nn.functional.normalize`.
        weight: multiplies the result.

    Returns:
        A 0-d tensor, or ``[N]`` for ``reduction="none"``, float32 (float64 where a factor is float64).

    Raises:
        TypeError, ValueError: as :func:`ftfast.ft_loss`.
    """
    check_options(p=p, reduction=reduction, eps=eps, weight=weight)
    check_factors(student_factor, teacher_factor, weight)
    dtype = compute_dtype(student_factor, teacher_factor)
    with _no_autocast(student_factor.device.type):
        student_direction = F.normalize(student_factor.to(dtype).flatten(1), dim=1, eps=eps)
        teacher_direction = F.normalize(teacher_factor.to(dtype).flatten(1), dim=1, eps=eps)
        difference = student_direction - teacher_direction
        per_sample = difference.abs().sum(1) if p == 1 else torch.linalg.vector_norm(difference, dim=1)
        return reduce_per_sample(per_sample, difference.shape[1], p=p, reduction=reduction) * scalar(weight, dtype)


def scalar(weight: float | Tensor, dtype: torch.dtype) -> float | Tensor:
    """The weight, such that it does not change the loss's dtype."""
    return weight.to(dtype) if isinstance(weight, Tensor) else weight


def has_autocast(device_type: str) -> bool:
    """Whether there is an autocast for devices of this type."""
    return torch.amp.is_autocast_available(device_type)


# torch 2.11's compiler cannot trace the question, and the answer never changes: it is asked once while tracing.
has_autocast._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _no_autocast(device_type: str) -> AbstractContextManager[None]:
    if has_autocast(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()


def reduce_per_sample(per_sample: Tensor, factor_size: int, *, p: int, reduction: str) -> Tensor:
    """``l: [N]`` to the value of a reduction; ``factor_size`` is D. N=0 divides zero by zero, as torch's mean does."""
    if reduction == "none":
        return per_sample
    divisor = reduction_divisor(per_sample.shape[0], factor_size, p=p, reduction=reduction)
    return per_sample.sum() / divisor


def reduction_divisor(samples: int, factor_size: int, *, p: int, reduction: str) -> int:
    """What the sum of ``l`` is divided by: N*D, N or 1."""
    if reduction == "mean":
        return samples * factor_size if p == 1 else samples
    return samples if reduction == "batchmean" else 1


def factor_transfer(
    student_features: Tensor,
    teacher_features: Tensor,
    paraphraser: nn.Module,
    translator: nn.Module,
    *,
    p: int = 1,
    reduction: str = "mean",
    eps: float = 1e-12,
    weight: float | Tensor = 1.0,
) -> Tensor:
    """The whole head: ``ft_loss(translator(student_features), paraphraser.encode(teacher_features))``.

    Args:
        student_features: ``[N, C_student, H, W]``.
        teacher_features: ``[N, C_teacher, H, W]``; no gradient flows into them.
        paraphraser: has ``encode``, as :class:`ftfast.Paraphraser`.
        translator: maps student features to factors, as :class:`ftfast.Translator`.
    """
    with torch.no_grad():
        teacher_factor = paraphraser.encode(teacher_features)  # type: ignore[operator]
    return ft_loss(translator(student_features), teacher_factor, p=p, reduction=reduction, eps=eps, weight=weight)


def attention_map(features: Tensor, exponent: float) -> Tensor:
    """``features ** exponent`` averaged over channels: ``[N, C, H, W]`` to ``[N, H*W]``, float32 or float64."""
    with _no_autocast(features.device.type):
        wide = features if features.dtype == torch.float64 else features.float()
        return wide.pow(exponent).mean(1).flatten(1)


def attention_difference(
    student_features: Tensor, teacher_features: Tensor, *, exponent: float = 2, p: float = 1
) -> Tensor:
    """The difference of two attention maps, as :func:`ftfast.ops.attention.difference.attention_difference`."""
    check_attention(student_features, teacher_features, exponent, p)
    height = min(student_features.shape[2], teacher_features.shape[2])
    directions = []
    with _no_autocast(student_features.device.type):
        for features in (student_features, teacher_features):
            features = features if features.dtype == torch.float64 else features.float()
            if features.shape[2] != height:
                features = F.adaptive_avg_pool2d(features, (height, height))
            directions.append(F.normalize(attention_map(features, exponent), dim=1))
        difference = directions[0] - directions[1]
        return (difference.abs() if p == 1 else difference.pow(p)).mean()


def check_attention(student: Tensor, teacher: Tensor, exponent: float, p: float) -> None:
    """Raises TypeError or ValueError where two maps cannot be compared."""
    for name, features in (("student_features", student), ("teacher_features", teacher)):
        if not isinstance(features, Tensor) or not features.is_floating_point():
            kind = f"a tensor of {features.dtype}" if isinstance(features, Tensor) else f"a {type(features).__name__}"
            raise TypeError(f"{name} is {kind}; it takes a floating-point map [N, C, H, W].")
        if features.layout != torch.strided:
            raise TypeError(f"{name} has layout {features.layout}; it takes a dense map, so pass {name}.to_dense().")
        if features.dim() != 4:
            raise ValueError(f"{name} has shape {tuple(features.shape)}; it takes a map [N, C, H, W].")
    if student.shape[0] != teacher.shape[0] or student.device != teacher.device:
        sides = [f"{side.shape[0]} samples on {side.device}" for side in (student, teacher)]
        raise ValueError(
            f"student_features has {sides[0]} and teacher_features {sides[1]}; both must see one batch, on one device."
        )
    height = min(student.shape[2], teacher.shape[2])
    widths = [side.shape[3] if side.shape[2] == height else height for side in (student, teacher)]
    if widths[0] != widths[1]:
        raise ValueError(
            f"student_features has maps of {tuple(student.shape[2:])} and teacher_features of "
            f"{tuple(teacher.shape[2:])}; only square maps are pooled to each other, so pool one side yourself."
        )
    for name, value, usual in (("exponent", exponent, "2"), ("p", p, "1 or 2")):
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"{name} is {value!r}; it takes a number, {usual} in both papers.")
        if not 0 < value < math.inf:
            raise ValueError(f"{name} is {value!r}; it takes a positive finite number, {usual} in both papers.")
