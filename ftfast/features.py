"""FeatureTap: a model's output and one of its feature maps, the layer given by name."""

import difflib
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn


class FeatureTap(nn.Module):
    """Runs a model and returns ``(output, features)``, the features being the output of one of its layers.

    A forward hook keeps the features, so the model keeps its own train and eval mode, parameters and state.

    Args:
        model: any model, shared and not copied.
        layer: the name of a submodule as ``model.named_modules()`` prints it, for example ``"layer4"``; of one that
            runs several times, the last output is taken.
        features_only: return the features alone. Where torchvision's extractor can trace the model, nothing past
            the layer runs (a teacher's classifier, say); the mode is then set by ``tap.train()`` and ``tap.eval()``.

    Raises:
        ValueError: the model has no such layer; the message has the nearest names.
        RuntimeError: from a call in which the layer did not run.
    """

    def __init__(self, model: nn.Module, layer: str, *, features_only: bool = False) -> None:
        super().__init__()
        check_layer(model, layer)
        self.layer = layer
        self.features_only = features_only
        self._listening = False  # the model may also be called past the tap; its features are then not kept alive
        self._features: Any = None
        cut = cut_model(model, {layer: "features"}) if features_only else None
        self.is_cut = cut is not None
        self.model = model if cut is None else cut
        if cut is None:
            model.get_submodule(layer).register_forward_hook(self._keep)
        self.training = model.training

    def _keep(self, _module: nn.Module, _inputs: Any, output: Any) -> None:
        if self._listening:
            self._features = output

    def forward(self, x: Tensor) -> Any:
        """``x`` as the model takes it; returns ``(output, features)``, or ``features`` with ``features_only``."""
        if self.is_cut:
            return self.model(x)["features"]
        self._listening = True
        try:
            output = self.model(x)
            features = self._features
        finally:
            self._listening, self._features = False, None
        if features is None:
            raise RuntimeError(f"layer {self.layer!r} did not run when the model was called; tap one that does.")
        return features if self.features_only else (output, features)


def check_layer(model: nn.Module, layer: str) -> None:
    """Raises ValueError with the nearest names where the model has no such layer."""
    names = [name for name, _ in model.named_modules() if name]
    if layer in names:
        return
    near = difflib.get_close_matches(str(layer), names, n=4, cutoff=0.5)
    top = ", ".join(name for name in names if "." not in name) or "none, it is a layer itself"
    advice = f"the nearest are {', '.join(near)}" if near else f"its top-level layers are {top}"
    raise ValueError(f"layer is {layer!r}, which the model does not have; {advice}.")


def cut_model(model: nn.Module, outputs: Mapping[str, str]) -> nn.Module | None:
    """The model up to the last of some layers, sharing its parameters; None where fx cannot trace it to one place each.

    Args:
        outputs: layers to the names that their outputs have in the dictionary that the model then returns.
    """
    try:
        from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names
    except ImportError:
        return None
    modes = {module: module.training for module in model.modules()}
    try:
        nodes = get_graph_node_names(model)[0]
        if any(re.fullmatch(re.escape(layer) + r"_\d+", node) for layer in outputs for node in nodes):
            return None  # a layer runs several times, and the extractor would take the first
        cut = create_feature_extractor(model, dict(outputs))
    except Exception:  # fx gives up on data-dependent forwards in many ways; the hook serves them all
        return None
    finally:
        for module, mode in modes.items():
            module.training = mode
    cut.training = model.training
    return cut
