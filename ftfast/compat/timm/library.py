"""The parts of timm that the task is built from, and what to do where they are missing."""

import warnings
from importlib import import_module, util
from typing import Any

import torch
from torch import nn

TESTED_VERSIONS = ("1.0.27", "1.0.28", "1.0.29", "1.0.30", "1.0.31")


def version() -> str:
    """That of the code that is imported: what is installed may be another copy."""
    try:
        return str(import_module("timm").__version__)
    except (ImportError, AttributeError):
        return "of an unknown version"


if util.find_spec("timm") is None:
    raise ImportError(
        "timm is not installed, and ftfast.compat.timm needs it; pip install 'ftfast[timm]'.", name="timm"
    )

try:
    import timm.task
    from timm.models import group_parameters
    from timm.task import DistillationTeacher, TrainingTask
    from timm.utils import unwrap_model
except ImportError as error:
    raise ImportError(
        f"timm {version()} lacks a part that ftfast.compat.timm needs ({error.msg}); ftfast is tested with timm "
        f"{', '.join(TESTED_VERSIONS)}: pip install -U 'ftfast[timm]'."
    ) from error


def resolve_criterion(criterion: Any, device: torch.device, criterion_kwargs: dict[str, Any] | None) -> Any:
    """The criterion on a device; None makes one of the arguments, by timm's own rule from 1.0.31 on.

    Raises:
        ValueError: a criterion and arguments for one, or arguments where timm is too old for them.
    """
    resolve = getattr(timm.task, "resolve_classification_loss", None)
    if resolve is not None:
        return resolve(criterion, device, criterion_kwargs=criterion_kwargs)
    if criterion_kwargs:
        raise ValueError(f"criterion_kwargs needs timm 1.0.31 or later, and this is {version()}; give a criterion.")
    criterion = nn.CrossEntropyLoss() if criterion is None else criterion
    return criterion.to(device) if isinstance(criterion, nn.Module) else criterion


if version() not in TESTED_VERSIONS:
    warnings.warn(f"ftfast is tested with timm {', '.join(TESTED_VERSIONS)}, and this is {version()}.", stacklevel=2)

__all__ = [
    "TESTED_VERSIONS",
    "DistillationTeacher",
    "TrainingTask",
    "group_parameters",
    "resolve_criterion",
    "unwrap_model",
    "version",
]
