"""torchdistill's FTLoss (``losses/mid_level.py``): the loss of two modules' outputs, found by the modules' paths."""

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ftfast.compat.directions import EPS, direction
from ftfast.ops.ft_loss.function import run

REDUCTIONS = ("mean", "sum", "none")


class FTLoss(nn.Module):
    """The p-norm of the difference of two normalised factors, scaled as torchdistill scales it.

    Args:
        p: the norm's order, 1 by default. 1 and 2 have kernels; any other number runs in plain torch.
        reduction: for p=1 ``"mean"`` over N*D, ``"sum"`` over N*D, or ``"none"`` for the absolute differences
            ``[N, D]``; for any other p ``"mean"`` over N of each sample's norm, and ``"sum"`` and ``"none"`` both
            their sum.
        paraphraser_path: the module of the teacher whose output is the teacher's factor.
        translator_path: the module of the student whose output is the student's factor.
        kwargs: ignored with a warning that names them; torchdistill ignores them without one.

    Unlike torchdistill's, a zero sample has a direction of zeros instead of nan, factors of 16 bits are compared in
    float32, and channels_last factors are not copied. An unknown reduction with p other than 1, which torchdistill
    takes for ``"sum"``, is refused.
    """

    def __init__(
        self,
        p: float = 1,
        reduction: str = "mean",
        paraphraser_path: str = "paraphraser",
        translator_path: str = "translator",
        **kwargs: Any,
    ) -> None:
        super().__init__()
        if isinstance(p, bool) or not isinstance(p, (int, float)) or p != p:
            raise TypeError(f"p is {p!r}; it takes a number, 1 or 2 for a kernel.")
        if reduction not in REDUCTIONS:
            raise ValueError(f'reduction is {reduction!r}; it takes "mean", "sum" or "none".')
        for name, path in (("paraphraser_path", paraphraser_path), ("translator_path", translator_path)):
            if not isinstance(path, str):
                raise TypeError(f"{name} is {path!r}; it takes a module's path as forward_hook has it.")
        if kwargs:
            taken = "p, reduction, paraphraser_path and translator_path"
            warnings.warn(f"FTLoss ignores {', '.join(kwargs)}; it takes {taken}.", stacklevel=2)
        self.norm_p = p
        self.reduction = reduction
        self.paraphraser_path = paraphraser_path
        self.translator_path = translator_path

    def forward(
        self,
        student_io_dict: Mapping[str, Mapping[str, Any]],
        teacher_io_dict: Mapping[str, Mapping[str, Any]],
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        """The loss of the outputs at ``teacher_io_dict[paraphraser_path]`` and ``student_io_dict[translator_path]``.

        Args:
            student_io_dict, teacher_io_dict: what torchdistill's hooks have kept; the factors are ``[N, ...]``.
            args, kwargs: ignored, such as the labels.

        Returns:
            0-d, or ``[N, D]`` for p=1 and ``"none"``; float32, or float64 where a factor is float64.

        Raises:
            LookupError: a path that no hook has kept the output of.
            TypeError, ValueError: as :func:`ftfast.ft_loss`.
        """
        try:
            teacher_factor = teacher_io_dict[self.paraphraser_path]["output"]
            student_factor = student_io_dict[self.translator_path]["output"]
        except KeyError:
            raise LookupError(self._missing(student_io_dict, teacher_io_dict)) from None
        p, reduction = self.norm_p, self.reduction
        if p == 2 or (p == 1 and reduction != "none"):
            order, reduction = int(p), "mean" if reduction == "mean" else "sum"
            return run(
                student_factor, teacher_factor, p=order, reduction=reduction, eps=EPS, weight=1.0, backend="auto"
            )
        return _in_plain_torch(student_factor, teacher_factor, p, reduction)

    def _missing(self, student: Mapping[str, Mapping[str, Any]], teacher: Mapping[str, Mapping[str, Any]]) -> str:
        sides = (
            ("paraphraser_path", self.paraphraser_path, "teacher", teacher),
            ("translator_path", self.translator_path, "student", student),
        )
        name, path, side, _ = next(each for each in sides if "output" not in each[3].get(each[1], {}))
        return (
            f"{name} is {path!r}, and the {side}'s hooks have kept no output of it; outputs are kept of "
            f"{_outputs(teacher)} (teacher) and {_outputs(student)} (student), so name one of the {side}'s, or add "
            f"{path!r} to its forward_hook."
        )

    def extra_repr(self) -> str:
        paths = f"paraphraser_path={self.paraphraser_path!r}, translator_path={self.translator_path!r}"
        return f"p={self.norm_p}, reduction={self.reduction!r}, {paths}"


def _outputs(kept: Mapping[str, Mapping[str, Any]]) -> str:
    return ", ".join(repr(path) for path, sides in kept.items() if "output" in sides) or "nothing"


def _in_plain_torch(student_factor: Tensor, teacher_factor: Tensor, p: float, reduction: str) -> Tensor:
    student, teacher = direction(student_factor), direction(teacher_factor)
    if student.shape != teacher.shape:
        raise ValueError(
            f"student_factor has shape {tuple(student_factor.shape)} and teacher_factor "
            f"{tuple(teacher_factor.shape)}; both must have the same samples, channels and map size."
        )
    difference = student - teacher
    if p == 1:
        return difference.abs()
    norms = torch.linalg.vector_norm(difference, p, dim=1)
    return norms.mean() if reduction == "mean" else norms.sum()
