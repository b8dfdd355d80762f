"""By which numbers the pixels of photographs are normalised: those that the networks' weights were trained with."""

from ftfast.distillation.data.photographs.decoding import IMAGENET, Colours, of_photographs
from ftfast.distillation.models import libraries
from ftfast.distillation.runtime import checkpoint, hub
from ftfast.distillation.settings.recipe import Recipe
from ftfast.errors import SettingsError


def of_recipe(recipe: Recipe) -> Colours:
    """The recipe's own, those of a teacher or student that is trained already, or else ImageNet's.

    Raises:
        SettingsError: teacher and student are both trained already, with unlike ones.
    """
    if recipe.mean:
        return Colours(recipe.mean, recipe.deviation)
    teacher = _of_teacher(recipe)
    student = _of_library(recipe.student) if recipe.student_pretrained else None
    if teacher is not None and student is not None and teacher != student:
        raise SettingsError(
            f"teacher {recipe.teacher} was trained on images of mean {_shown(teacher.mean)} and deviation "
            f"{_shown(teacher.deviation)}, and student {recipe.student} on {_shown(student.mean)} and "
            f"{_shown(student.deviation)}; give --no-student-pretrained, or --mean and --deviation for both."
        )
    return teacher or student or IMAGENET


def _of_teacher(recipe: Recipe) -> Colours | None:
    if recipe.teacher_checkpoint is not None:
        described = checkpoint.describe_weights(hub.local(recipe.teacher_checkpoint))
        if described is not None:
            return of_photographs(described["photographs"]) if "photographs" in described else None
        return _of_library(recipe.teacher)  # a file of others, trained further from the library's weights perhaps
    return _of_library(recipe.teacher) if recipe.pretrained else None


def _of_library(model: str) -> Colours | None:
    found = libraries.pretrained_colours(model)
    return None if found is None else Colours(*found)


def _shown(values: tuple[float, ...]) -> str:
    return ",".join(f"{value:.4g}" for value in values)
