"""Plans of the loss for callers that have checked their factors already."""

from types import ModuleType
from typing import Any

from torch import Tensor

from ftfast.backends import LossPlan

_plans: dict[tuple[Any, ...], LossPlan] = {}
_MOST_PLANS = 4096


def loss_plan(launchers: ModuleType, student: Tensor, teacher: Tensor, p: int, reduction: str, eps: float) -> LossPlan:
    """``launchers.LossPlan`` for factors of this kind, made once."""
    sides = (student.shape, student.stride(), student.dtype, teacher.stride(), teacher.dtype)
    key = (launchers, student.device, p, reduction, eps, *sides)
    plan = _plans.get(key)
    if plan is None:
        if len(_plans) >= _MOST_PLANS:
            _plans.clear()
        plan = _plans[key] = launchers.LossPlan(student, teacher, p, reduction, eps)
    return plan
