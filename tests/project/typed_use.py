# mypy: disallow-untyped-calls, disallow-any-generics, warn-return-any
"""What a type checker knows of the public names: read by mypy in ``make lint``, never run."""

from typing import assert_type

from torch import Tensor, nn

import ftfast
from ftfast import FactorTransfer, FrozenTeacher, FTLoss, Paraphraser, Translator, train_paraphraser


def calls_give_tensors(student: Tensor, teacher: Tensor, model: nn.Module) -> None:
    paraphraser, translator = Paraphraser(64), Translator(16, 32)
    assert_type(FTLoss()(student, teacher), Tensor)
    assert_type(FTLoss()(student_factor=student, teacher_factor=teacher), Tensor)
    assert_type(FactorTransfer(paraphraser, translator)(student, teacher_factor=teacher), Tensor)
    assert_type(paraphraser(teacher), Tensor)
    assert_type(translator(student), Tensor)
    assert_type(FrozenTeacher(model, "layer4")(student).features, Tensor)
    assert_type(train_paraphraser(teacher, steps=1), Paraphraser)
    taught = ftfast.distill(model, model, [(student, teacher)], teacher_layer="layer4", student_layer="layer4")
    assert_type(taught, ftfast.Distilled)
    assert_type(taught.accuracy, float | None)


def options_are_literals(reduction: ftfast.Reduction, backend: ftfast.Backend) -> None:
    FTLoss(reduction=reduction, backend=backend).reduction = "sum"
    FTLoss(reduction="median")  # type: ignore[arg-type]
    FactorTransfer(Paraphraser(64), Translator(16, 32), backend="cuda")  # type: ignore[arg-type]
    FTLoss()(1.0, 2.0)  # type: ignore[arg-type]
