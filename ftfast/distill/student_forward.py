"""A student's forward in training: logits and features, through its graph where it has one."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ftfast.distill import frozen_graph
from ftfast.distill.methods import Outputs
from ftfast.features import FeatureTap


def student_forward(student: nn.Module, layer: str, *, compiled: bool) -> Callable[[Tensor], Outputs]:
    """Images to the outputs of a student and of one of its layers; parameters and modes stay the student's own.

    Args:
        compiled: through torch.compile, at the first call; a student that torch.fx cannot trace is compiled in the
            pieces that torch finds.
    """
    if compiled:
        try:
            graph = torch.compile(frozen_graph.trace(student, layer, classifier=True).module, dynamic=False)
        except Exception:  # torch.fx gives up on data-dependent forwards in many ways; the hook serves them all
            student.compile(dynamic=False)
        else:

            def run(images: Tensor) -> Outputs:
                features, logits = graph(images)
                return Outputs(logits, features)

            return run
    tap = FeatureTap(student, layer)
    return lambda images: Outputs(*tap(images))
