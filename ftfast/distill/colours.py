"""By which numbers the pixels of photographs are normalised: those that the networks' weights were trained with."""

import json
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ftfast.distill import checkpoint, libraries
from ftfast.distill.errors import CheckpointError, SettingsError

if TYPE_CHECKING:
    from ftfast.distill.settings import Settings


class Colours(NamedTuple):
    """Mean and deviation of a photograph's three colours, of pixels from 0 to 1."""

    mean: tuple[float, ...]
    deviation: tuple[float, ...]


# Of ImageNet's training images; torchvision's models and most of timm's were trained with these.
IMAGENET = Colours((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def of_settings(settings: "Settings") -> Colours:
    """The settings' own, those of a teacher or student that is trained already, or else ImageNet's.

    Raises:
        SettingsError: teacher and student are both trained already, with unlike ones.
    """
    if settings.mean:
        return Colours(settings.mean, settings.deviation)
    teacher = _of_teacher(settings)
    student = _of_library(settings.student) if settings.student_pretrained else None
    if teacher is not None and student is not None and teacher != student:
        raise SettingsError(
            f"teacher {settings.teacher} was trained on images of mean {_shown(teacher.mean)} and deviation "
            f"{_shown(teacher.deviation)}, and student {settings.student} on {_shown(student.mean)} and "
            f"{_shown(student.deviation)}; give --no-student-pretrained, or --mean and --deviation for both."
        )
    return teacher or student or IMAGENET


def _of_teacher(settings: "Settings") -> Colours | None:
    if settings.teacher_checkpoint is not None:
        described = _described(Path(settings.teacher_checkpoint))
        if described is not None:
            return of_photographs(described["photographs"]) if "photographs" in described else None
        return _of_library(settings.teacher)  # a file of others, trained further from the library's weights perhaps
    return _of_library(settings.teacher) if settings.pretrained else None


def _of_library(model: str) -> Colours | None:
    found = libraries.pretrained_colours(model)
    return None if found is None else Colours(*found)


def _described(path: Path) -> dict[str, Any] | None:
    """What a checkpoint of ours says of itself; None where it is not ours, or cannot be read, which is said later."""
    with suppress(CheckpointError, OSError, ValueError):
        if path.is_dir():
            return checkpoint.read_description(path)
        if path.suffix == ".safetensors":
            metadata = checkpoint.read_metadata(path)
            return json.loads(metadata["ftfast"]) if "ftfast" in metadata else None
    return None


def of_photographs(described: dict[str, Any]) -> Colours:
    """Those that a checkpoint's ``"photographs"`` name, or ImageNet's where they name none."""
    if "mean" not in described:
        return IMAGENET
    return Colours(tuple(described["mean"]), tuple(described["deviation"]))


def to_photographs(colours: Colours) -> dict[str, Any]:
    """What :func:`of_photographs` reads; nothing of ImageNet's, as checkpoints had it before there were others."""
    return {} if colours == IMAGENET else {name: list(values) for name, values in colours._asdict().items()}


def _shown(values: tuple[float, ...]) -> str:
    return ",".join(f"{value:.4g}" for value in values)
