"""A model's forward in training: logits and features, through its graph where it has one."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ftfast.distill.models import inference_graph, training_graph
from ftfast.distill.training.methods import Outputs
from ftfast.features import FeatureTap


def training_forward(
    model: nn.Module, layer: str, *, compiled: bool, fused: bool = False
) -> Callable[[Tensor], Outputs]:
    """Images to the outputs of a model and of one of its layers; parameters and modes stay the model's own.

    Args:
        compiled: through torch.compile, at the first call; a model that torch.fx cannot trace is compiled in the
            pieces that torch finds.
        fused: on the CPU, each convolution with what follows it as one call; where torch.fx cannot trace the model,
            as its own modules. Not together with ``compiled``.
    """
    graph: Callable[[Tensor], Any] | None = None
    try:
        if compiled:
            graph = torch.compile(inference_graph.trace(model, layer, classifier=True).module, dynamic=False)
        elif fused:
            graph = training_graph.fused(model, layer)
    except Exception:  # torch.fx gives up on data-dependent forwards in many ways; the hook serves them all
        if compiled:
            model.compile(dynamic=False)
    if graph is not None:

        def run(images: Tensor) -> Outputs:
            features, logits = graph(images)
            return Outputs(logits, features)

        return run
    tap = FeatureTap(model, layer)
    return lambda images: Outputs(*tap(images))
