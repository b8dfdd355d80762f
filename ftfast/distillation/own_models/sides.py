"""Teacher and student as they are given: what they make of a batch, and whether they go together."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor, nn

from ftfast.distillation.training.methods import any_needs
from ftfast.distillation.training.step.step import Precision
from ftfast.errors import SettingsError
from ftfast.features.feature_maps import feature_map
from ftfast.features.layer_outputs import check_layer
from ftfast.features.tap import FeatureTap


@dataclass(frozen=True)
class Side:
    """What a teacher or a student makes of images.

    Attributes:
        as_map: its layer's output to a map ``[N, C, H, W]``.
        classes: of its logits.
        channels, size: of the map, and its height and width.
    """

    as_map: Callable[[Any], Tensor]
    classes: int
    channels: int
    size: tuple[int, int]

    @classmethod
    def of(cls, name: str, model: nn.Module, layer: str, images: Tensor, precision: Precision) -> Self:
        """Found out with a batch; the model's mode and running statistics stay as they are.

        Raises:
            SettingsError: no logits, or a layer that gives no map.
            ValueError: no such layer.
        """
        try:
            check_layer(model, layer)
        except ValueError as error:
            raise ValueError(f"{name}_{error}") from None
        modes = {module: module.training for module in model.modules()}
        try:
            with FeatureTap(model.eval(), layer) as tap, torch.no_grad(), precision.autocast():
                logits, features = tap(images)
        finally:
            for module, mode in modes.items():
                module.training = mode
        if not isinstance(logits, Tensor) or logits.dim() != 2 or len(logits) != len(images):
            given = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise SettingsError(f"{name} gives {given} for {len(images)} images; it takes a model of logits [N, K].")
        as_map = partial(feature_map, model=model, image_size=images.shape[2:], layer=model.get_submodule(layer))
        try:
            found = as_map(features)
        except (TypeError, ValueError) as error:
            raise SettingsError(f"{name}_layer is {layer!r}, whose {error}") from None
        return cls(as_map, logits.shape[1], found.shape[1], (found.shape[2], found.shape[3]))


def check_models(teacher: nn.Module, student: nn.Module) -> None:
    """Raises SettingsError or TypeError on models that cannot be trained together, whatever they compute."""
    for name, model in (("teacher", teacher), ("student", student)):
        if not isinstance(model, nn.Module):
            raise TypeError(f"{name} is a {type(model).__name__}; it takes a torch.nn.Module.")
        for parameter_name, parameter in model.named_parameters():
            if parameter.dtype != torch.float32:
                raise SettingsError(
                    f"{name} has {parameter_name!r} in {parameter.dtype}; give it in float32 and the dtype of the "
                    "arithmetic as dtype."
                )
    if not any(parameter.requires_grad for parameter in student.parameters()):
        raise SettingsError("student has no parameter that requires a gradient; call student.requires_grad_().")
    taught = {id(parameter) for parameter in teacher.parameters()}
    shared = [name for name, parameter in student.named_parameters() if id(parameter) in taught]
    if shared:
        raise SettingsError(f"student shares {shared[0]!r} with teacher, which is frozen; give it a copy of its own.")


def check_classes(method: str, teacher: Side, student: Side) -> None:
    """Raises SettingsError where the method compares logits that are not of the same classes."""
    if any_needs([method], "logits") and teacher.classes != student.classes:
        raise SettingsError(
            f"teacher gives logits of {teacher.classes} classes and student of {student.classes}, and method "
            f"{method!r} compares them; take one without soft labels."
        )


def common_size(method: str, teacher: Side, student: Side, *, pools: bool) -> tuple[int, int]:
    """Height and width of the maps that are compared, the smaller ones.

    Raises:
        SettingsError: maps of unlike size where ``pools`` is False and the method compares them.
    """
    if teacher.size != student.size and not pools and any_needs([method], "maps", "factors"):
        (height, width), (own_height, own_width) = teacher.size, student.size
        raise SettingsError(
            f"teacher_layer gives maps of {height}x{width} and student_layer of {own_height}x{own_width}; give "
            "resize_features=True to pool the larger, or other layers."
        )
    return min(teacher.size[0], student.size[0]), min(teacher.size[1], student.size[1])
