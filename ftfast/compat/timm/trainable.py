"""The module that is trained, and that DDP, torch.compile and the moving average wrap: student and translator."""

import copy
from collections.abc import Callable
from typing import Any, Self

from torch import Tensor, nn

from ftfast.compat.timm.library import group_parameters, unwrap_model
from ftfast.compat.timm.maps import check_forward_features, feature_map
from ftfast.features.tap import FeatureTap
from ftfast.head import FactorTransfer


class StudentTap:
    """Reads a student's logits and its feature map in one run.

    Args:
        student: the student.
        layer: the name of the layer to take; None takes what ``forward_features`` returns.

    Raises:
        ValueError: a layer that the student does not have, with the nearest names, or a student without
            ``forward_features`` where no layer is given.
    """

    def __init__(self, student: nn.Module, layer: str | None = None) -> None:
        if layer is None:
            check_forward_features(student, "student")
        self.tap = None if layer is None else FeatureTap(unwrap_model(student), layer)
        self.layer = None if layer is None else unwrap_model(student).get_submodule(layer)

    def __call__(self, student: Any, images: Tensor) -> tuple[Any, Tensor]:
        """The logits and the map ``[N, C, H, W]``."""
        if self.tap is None:
            features = student.forward_features(images)
            logits = student.forward_head(features)
        else:
            logits, features = self.tap(images)
        return logits, feature_map(features, student, images.shape[-2:], self.layer)


class FactorTransferTrainableModule(nn.Module):
    """A student and the translator of a Factor Transfer head, whose paraphraser is used and not owned.

    Args:
        student_model: the student.
        head: its translator becomes ``.translator``; its frozen paraphraser is no submodule here, so it is in no
            optimiser, DDP bucket or moving average.
        tap: reads the student's map.
    """

    def __init__(self, student_model: nn.Module, head: FactorTransfer, tap: StudentTap) -> None:
        super().__init__()
        self.student = student_model
        self.translator = head.translator
        self._head = (head,)  # a tuple, so that it is no submodule: the paraphraser would come with it
        self._tap = tap

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """A copy that shares the paraphraser, which never changes."""
        memo[id(self.head.paraphraser)] = self.head.paraphraser
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        copied.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return copied

    @property
    def head(self) -> FactorTransfer:
        """The head, paraphraser included."""
        return self._head[0]

    def forward(self, images: Tensor, teacher_map: Tensor) -> tuple[Any, Tensor]:
        """The student's logits, and the head's loss, 0-d, against the teacher's map ``[N, C_teacher, H, W]``."""
        logits, student_map = self._tap(self.student, images)
        return logits, self.head(student_map, teacher_map)

    def no_weight_decay(self) -> set[str]:
        """The student's own, with the prefix that its parameters have here."""
        student = unwrap_model(self.student)
        return {f"student.{name}" for name in getattr(student, "no_weight_decay", set)()}

    def group_matcher(self, coarse: bool = False) -> Callable[[str], int] | dict[str, str]:
        """Layers for timm's layer-wise learning rates: the student's own, the translator with its last."""
        student = unwrap_model(self.student)
        if not hasattr(student, "group_matcher"):
            return {}
        layers = group_parameters(student, student.group_matcher(coarse=coarse), reverse=True)
        last = max(layers.values(), default=0)
        return lambda name: layers.get(name.removeprefix("student."), last) if name.startswith("student.") else last
