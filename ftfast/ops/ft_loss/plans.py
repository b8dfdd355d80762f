"""Plans of the loss for callers that have checked their factors already."""

from types import ModuleType
from typing import Any

from torch import Tensor

from ftfast.backends import LossPlan
from ftfast.ops.memory import layout_of
from ftfast.ops.remembered import Remembered

_plans: Remembered[tuple[Any, ...], LossPlan] = Remembered()


def loss_plan(launchers: ModuleType, student: Tensor, teacher: Tensor, p: int, reduction: str, eps: float) -> LossPlan:
    """``launchers.LossPlan`` for factors of this kind, made once."""
    sides = (student.shape, student.stride(), student.dtype, teacher.stride(), teacher.dtype)
    key = (launchers, student.device, p, reduction, eps, *sides)
    return _plans.get(key) or _plans.keep(
        key, _made(launchers.LossPlan(student, teacher, p, reduction, eps), student, teacher)
    )


def _made(plan: LossPlan, student: Tensor, teacher: Tensor) -> LossPlan:
    plan.layouts = layout_of(student), layout_of(teacher)
    return plan
