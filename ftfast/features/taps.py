"""Several layers at once: FeatureTaps reads their maps, FactorTransfers adds up a head for each."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ftfast.features.layer_outputs import LayerOutputs
from ftfast.head import FactorTransfer

Maps = Mapping[str, Tensor] | Sequence[Tensor]


class FeatureTaps(LayerOutputs):
    """Runs a model once and returns ``(output, features)``, the features a dictionary of several layers' outputs.

    Everything else is as :class:`ftfast.FeatureTap` has it, :meth:`close` too.

    Args:
        model: any model, shared and not copied; its mode, parameters and state stay its own.
        layers: names of submodules as ``model.named_modules()`` and ``ftfast features`` print them; or a mapping of
            names of your choice to them, so that a teacher's layers can go by the same names as a student's. Of a
            layer that runs several times, the last output is taken.
        features_only: return the features alone. Where torch.fx can trace the model, nothing past the last of the
            layers runs; the mode is then set by ``taps.train()`` and ``taps.eval()``.

    Raises:
        ValueError: no layers, one named twice, or one that the model does not have, with the nearest names.
        RuntimeError: from a call, as FeatureTap.
    """

    def __init__(
        self, model: nn.Module, layers: Sequence[str] | Mapping[str, str], *, features_only: bool = False
    ) -> None:
        if isinstance(layers, str):
            raise ValueError(f"layers is the one name {layers!r}; it takes several in a list, or use FeatureTap.")
        named = dict(layers) if isinstance(layers, Mapping) else {layer: layer for layer in layers}
        if not named or len(named) != len(layers) or len(set(named.values())) != len(named):
            raise ValueError(f"layers is {layers!r}; it takes at least one layer, and each of them once.")
        super().__init__(model, named, features_only=features_only)
        self.layers = named

    def forward(self, *inputs: Any, **named: Any) -> Any:
        """What the model takes; returns ``(output, {name: features})``, or the dictionary alone."""
        output, features = self.outputs(*inputs, **named)
        return features if self.features_only else (output, features)


class FactorTransfers(nn.Module):
    """Factor transfer between several pairs of layers: the sum of a :class:`ftfast.FactorTransfer` for each.

    Every pair has its own paraphraser, translator and weight, and its loss is computed as that head does it alone.

    Args:
        heads: names to heads, the names being those that features are given by; or a sequence, whose names are
            ``"0"``, ``"1"``, ... All have the same ``reduction``.

    Keys: ``heads.{0,1,...}.*`` in the order given.

    Raises:
        TypeError: something that is no FactorTransfer.
        ValueError: no heads, one that is given twice, or unlike reductions.
    """

    def __init__(self, heads: Mapping[str, FactorTransfer] | Sequence[FactorTransfer]) -> None:
        super().__init__()
        named = dict(heads) if isinstance(heads, Mapping) else {str(place): head for place, head in enumerate(heads)}
        for name, head in named.items():
            if not isinstance(head, FactorTransfer):
                raise TypeError(f"heads[{name!r}] is a {type(head).__name__}; it takes a ftfast.FactorTransfer.")
        if not named:
            raise ValueError("heads is empty; it takes a ftfast.FactorTransfer for every pair of layers.")
        if len({id(head) for head in named.values()}) != len(named):
            raise ValueError(f"heads has one head under two of {', '.join(named)}; give each pair of layers its own.")
        reductions = {name: head.loss.reduction for name, head in named.items()}
        if len(set(reductions.values())) > 1:
            raise ValueError(f"heads have the reductions {reductions}, which cannot be added; give all the same.")
        self.names = tuple(named)
        self.heads = nn.ModuleList(named.values())  # not a ModuleDict, whose keys may have no dots

    def forward(
        self, student_features: Maps, teacher_features: Maps | None = None, *, teacher_factors: Maps | None = None
    ) -> Tensor:
        """The sum of :meth:`losses`, 0-d, or ``[N]`` where the heads' reduction is ``"none"``."""
        losses = list(self.losses(student_features, teacher_features, teacher_factors=teacher_factors).values())
        total = losses[0]
        for loss in losses[1:]:
            total = total + loss
        return total

    def losses(
        self, student_features: Maps, teacher_features: Maps | None = None, *, teacher_factors: Maps | None = None
    ) -> dict[str, Tensor]:
        """Each head's loss by its name, times its weight; their sum is what to train with.

        Args:
            student_features: names to maps ``[N, C_student, H, W]``, one for every head; or a sequence in the heads'
                order.
            teacher_features: the same of the teacher, ``[N, C_teacher, H, W]``; or
            teacher_factors: the same of known factors ``[N, factor_channels, H, W]``. Exactly one of the two is given.

        Raises:
            TypeError, ValueError: names that do not match the heads', both sides listed; or features that a head
                refuses, with the head's name.
        """
        if (teacher_features is None) == (teacher_factors is None):
            raise ValueError(
                "FactorTransfers takes exactly one of teacher_features and teacher_factors; "
                f"it got {'neither' if teacher_features is None else 'both'}."
            )
        student = self._by_name("student_features", student_features)
        features = None if teacher_features is None else self._by_name("teacher_features", teacher_features)
        factors = None if teacher_factors is None else self._by_name("teacher_factors", teacher_factors)
        found = {}
        for name, head in zip(self.names, self.heads, strict=True):
            try:
                found[name] = head(
                    student[name],
                    None if features is None else features[name],
                    teacher_factor=None if factors is None else factors[name],
                )
            except (TypeError, ValueError) as error:
                if torch.compiler.is_compiling():
                    raise
                kind = TypeError if isinstance(error, TypeError) else ValueError
                raise kind(f"head {name!r}: {error}") from None
        return found

    def _by_name(self, argument: str, maps: Maps) -> Mapping[str, Tensor]:
        if isinstance(maps, Tensor):
            raise TypeError(f"{argument} is a tensor; it takes a mapping of names to maps, or a sequence of maps.")
        if isinstance(maps, Mapping):
            if set(maps) != set(self.names):
                raise ValueError(
                    f"{argument} has {', '.join(map(str, maps)) or 'nothing'} and the heads are "
                    f"{', '.join(self.names)}; give one map for each head, under its name."
                )
            return maps
        if len(maps) != len(self.names):
            raise ValueError(
                f"{argument} has {len(maps)} maps and there are {len(self.names)} heads ({', '.join(self.names)}); "
                "give one map for each, in this order."
            )
        return dict(zip(self.names, maps, strict=True))

    def extra_repr(self) -> str:
        return f"names={self.names}"
