"""A student, what its method puts beside it, and the loss of both."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ftfast.distillation.models.registry import Outputs, place
from ftfast.distillation.monitor.step_clock import timed
from ftfast.distillation.runtime.seeds import seeded
from ftfast.distillation.training.methods import METHODS, Terms
from ftfast.distillation.training.step.step import BesideStudent
from ftfast.distillation.training.terms import Pair, Stored, Taught


def taught_student(
    student: nn.Module,
    forward: Callable[[Tensor], Outputs],
    teacher: Callable[[Tensor], Outputs],
    *,
    method: str,
    pair: Pair,
    device: torch.device,
    seed: int,
) -> tuple[nn.ModuleDict, Callable[..., Terms]]:
    """What learns, the student as ``model`` and beside it what its method adds, and the terms of its loss.

    The terms take images, labels and, where a factor store stands in for the teacher, what :class:`Stored` holds.

    Args:
        forward: the student's, in training.
        teacher: without a graph.
        seed: of the weights that the method adds.
    """
    chosen = METHODS[method]
    trainable = nn.ModuleDict({"model": student})
    with seeded(seed):
        made = chosen.between(pair)
    between = None if made is None else place(made.module, device)
    if made is not None:
        trainable[made.name] = made.learns
    both = BesideStudent(teacher, forward)

    def terms(images: Tensor, labels: Tensor, *stored: Tensor) -> Terms:
        taught: Taught | None = None
        if chosen.needs and not stored:
            found, taught = both(images)
        else:
            with timed("student"):
                found = forward(images)
            if chosen.needs:
                taught = Stored(*stored)
        with timed("head"):
            return chosen.terms(found, taught, labels, between, pair.weights)

    return trainable, terms
