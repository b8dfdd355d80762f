"""FeatureTap: a model's output and one of its feature maps, the layer given by name."""

from typing import Any

from torch import nn

from ftfast.features.layer_outputs import LayerOutputs


class FeatureTap(LayerOutputs):
    """Runs a model and returns ``(output, features)``, the features being the output of one of its layers.

    A forward hook keeps the features, so the model keeps its own train and eval mode, parameters and state. They are
    what the layer returned: where a later layer writes to it in place, they are a copy. Threads may share a tap, and
    ``DataParallel`` may be around it. :meth:`close`, or leaving ``with FeatureTap(...) as tap:``, removes the hook.

    Args:
        model: any model, shared and not copied.
        layer: the name of a submodule as ``model.named_modules()`` prints it, for example ``"layer4"``; of one that
            runs several times, the last output is taken.
        features_only: return the features alone. Where torch.fx can trace the model, nothing past the layer runs (a
            teacher's classifier, say); the mode is then set by ``tap.train()`` and ``tap.eval()``.

    Raises:
        ValueError: the model has no such layer; the message has the nearest names.
        RuntimeError: from a call in which the layer did not run, ran in a replica that ``DataParallel`` made inside
            of the tap, or inside of a reentrant checkpoint, which leaves features without a gradient; or after
            :meth:`close`.
    """

    def __init__(self, model: nn.Module, layer: str, *, features_only: bool = False) -> None:
        super().__init__(model, {"features": layer}, features_only=features_only)
        self.layer = layer

    def forward(self, *inputs: Any, **named: Any) -> Any:
        """What the model takes; returns ``(output, features)``, or ``features`` with ``features_only``."""
        output, found = self.outputs(*inputs, **named)
        return found["features"] if self.features_only else (output, found["features"])
