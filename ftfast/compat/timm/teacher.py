"""The frozen side: the teacher, and its feature map for images that were normalised for the student."""

from typing import Any, Self

import torch
from torch import Tensor, nn

from ftfast.compat.timm.library import DistillationTeacher
from ftfast.compat.timm.maps import check_forward_features, feature_map
from ftfast.features.tap import FeatureTap

USUAL_STATISTICS = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


def frozen_teacher(
    given: str | nn.Module,
    student: nn.Module,
    pretrained_path: str | None,
    pretrained_cfg_overlay: dict[str, Any] | None,
    device: torch.device,
    dtype: torch.dtype,
) -> DistillationTeacher:
    """timm's DistillationTeacher of a model or a model's name, of the student's classes and channels, frozen."""
    if not isinstance(given, DistillationTeacher):
        overlay = {} if pretrained_cfg_overlay is None else {"pretrained_cfg_overlay": pretrained_cfg_overlay}  # 1.0.31
        given = DistillationTeacher(
            given,
            num_classes=getattr(student, "num_classes", None),
            in_chans=getattr(student, "in_chans", 3),
            pretrained_path=pretrained_path,
            device=device,
            dtype=dtype,
            **overlay,
        )
    return given.requires_grad_(False).eval()


class TeacherNormalisation(nn.Module):
    """Images normalised for a student, as they are normalised for its teacher.

    Whether the two differ is found out once, here: to compare them in every step would make a GPU wait.

    Args:
        student: its ``pretrained_cfg`` has ``mean`` and ``std``, ImageNet's where it has none.
        teacher: has them as the buffers ``mean_kd`` and ``std_kd`` ``[1, C, 1, 1]``, as timm's DistillationTeacher.
    """

    student_mean: Tensor
    student_std: Tensor
    teacher_mean: Tensor
    teacher_std: Tensor

    def __init__(self, student: nn.Module, teacher: nn.Module) -> None:
        super().__init__()
        configuration: Any = getattr(student, "pretrained_cfg", None) or {}
        for name, usual in USUAL_STATISTICS.items():
            theirs = teacher.get_buffer(f"{name}_kd")
            ours = theirs.new_tensor(configuration.get(name) or usual).view(1, -1, 1, 1)
            self.register_buffer(f"student_{name}", ours, persistent=False)
            self.register_buffer(f"teacher_{name}", theirs.clone(), persistent=False)
        self.is_identity = torch.equal(self.student_mean, self.teacher_mean) and torch.equal(
            self.student_std, self.teacher_std
        )

    def forward(self, images: Tensor) -> Tensor:
        """``[N, C, H, W]`` to the same shape."""
        if self.is_identity:
            return images
        return (images * self.student_std + self.student_mean - self.teacher_mean) / self.teacher_std


class TeacherMaps(nn.Module):
    """Reads one feature map of a model, without a graph and always in eval mode.

    Args:
        model: shared and not copied.
        layer: the name of a submodule; None takes what ``forward_features`` returns.
        normalise: what happens to the images before.
    """

    def __init__(self, model: nn.Module, layer: str | None = None, normalise: nn.Module | None = None) -> None:
        super().__init__()
        if layer is None:
            check_forward_features(model, "teacher")
        self.model: Any = model
        self.tap = None if layer is None else FeatureTap(model, layer, features_only=True)
        self.layer = None if layer is None else model.get_submodule(layer)
        self.normalise = normalise
        self.train(False)

    def train(self, mode: bool = True) -> Self:
        """Stays in eval whatever the mode."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Images ``[N, C, H, W]`` to the model's map ``[N, C, H, W]``."""
        if self.normalise is not None:
            images = self.normalise(images)
        features = self.model.forward_features(images) if self.tap is None else self.tap(images)
        return feature_map(features, self.model, images.shape[-2:], self.layer)
