"""Every setting of a distillation run: typed, checked and printable."""

import dataclasses
import json
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch

from ftfast.arguments import has_bfloat16
from ftfast.distillation.data.datasets import DATASETS
from ftfast.distillation.data.images import steps_of
from ftfast.distillation.data.photographs import decoding
from ftfast.distillation.data.source import default_folder
from ftfast.distillation.models import registry
from ftfast.distillation.runtime import hub
from ftfast.distillation.settings import normalisation
from ftfast.distillation.settings.checks import check_recipe
from ftfast.distillation.settings.fields import check_fields
from ftfast.distillation.settings.meaning import Meaning
from ftfast.distillation.settings.recipe import DTYPES
from ftfast.distillation.training.methods import any_needs
from ftfast.distillation.training.schedule import Schedule
from ftfast.distillation.training.terms import WEIGHTS
from ftfast.errors import SettingsError

__all__ = ["DTYPES", "HINTS", "Settings"]
FORMAT = "ftfast-settings"
VERSION = 1
# Compiling takes a student seconds, and saves milliseconds a step.
STEPS_WORTH_COMPILING = 2000


@dataclass(frozen=True)
class Settings(Meaning):
    """The settings of one run; the defaults are the recipe for digits. Each field is an option, ``--field-name``.

    Raises:
        SettingsError: a value outside what its field takes.
    """

    def __post_init__(self) -> None:
        check_fields(self)
        check_recipe(self)
        if not self.dataset().train_images:
            return  # photographs that are not counted yet
        self._check_image_counts()
        self._check_folds()
        if self.images_of_students() < self.batch_size:
            raise SettingsError(
                f"student_images is {self.images_of_students()}, fewer than a batch of {self.batch_size}; give more "
                "images or a lower --batch-size."
            )

    def _check_folds(self) -> None:
        fewest = (2 if self.is_noise else self.dataset().classes) * self.validation_folds
        images = self.images_of_students()
        if len(self.weight_grid()) > 1 and images < fewest:
            raise SettingsError(
                f"student_images is {images}; to choose weights on {self.validation_folds} folds it takes "
                f"at least {fewest}: give more images, a lower --validation-folds, or one value of each weight."
            )

    def _check_image_counts(self) -> None:
        dataset = self.dataset()
        whole, fewest = dataset.train_images, 2 if self.is_noise else dataset.classes
        for name in ("student_images", "paraphraser_held_out"):
            if name == "paraphraser_held_out" and self.store is not None:
                continue  # no paraphraser is trained
            value = self.images_of_students() if name == "student_images" else getattr(self, name)
            is_all = name == "student_images" and value == whole
            if not is_all and not fewest <= value <= whole - fewest:
                raise SettingsError(
                    f"{name} is {value}; it takes {fewest} to {whole - fewest}, so that each of {fewest} classes is on "
                    "both sides of the cut."
                )

    def _check_map_sizes(self) -> None:
        teacher, student = self.teacher_features(), self.student_features()
        alike = (teacher.height, teacher.width) == (student.height, student.width)
        if any_needs(self.methods, "maps", "factors") and not alike and not self.resize_features:
            raise SettingsError(
                f"the feature maps of teacher and student differ in size: {self.teacher}'s {teacher.layer} is "
                f"{teacher.height}x{teacher.width} and {self.student}'s {student.layer} "
                f"{student.height}x{student.width}; give --resize-features to pool the larger, or other layers."
            )

    def resolved(self) -> Self:
        """The same settings with nothing left to the machine, the data or the models.

        Raises:
            SettingsError: a device that is not there, an unknown layer, or feature maps of unlike size.
            HubError: a checkpoint that cannot be had from the Hub.
        """
        if DATASETS[self.data].is_streamed and not (self.classes and self.train_images and self.test_images):
            return self._counted().resolved()
        device = self._resolved_device()
        in_files = DATASETS[self.data].in_files
        repeats = "off" if device == "cuda" and DATASETS[self.data].is_streamed else "on"
        self._check_map_sizes()
        derived: dict[str, Any] = {name: self.values_of_weight(name) for name in WEIGHTS}
        if DATASETS[self.data].is_streamed:
            derived |= normalisation.of_recipe(self)._asdict()
        return dataclasses.replace(
            self,
            device=device,
            dtype=self._resolved_dtype(device),
            compile=self._resolved_compile(device),
            deterministic=self.deterministic if self.deterministic != "auto" else repeats,
            graph=self._resolved_graph(device),
            threads=self.threads or torch.get_num_threads(),
            **derived,
            teacher_checkpoint=_pinned(self.teacher_checkpoint),
            paraphraser_checkpoint=_pinned(self.paraphraser_checkpoint),
            data_dir=str(Path(self.data_dir or default_folder()).absolute()) if in_files else None,
            store=_absolute(self.store),
            student_images=self.images_of_students(),
            teacher_channels=_channels(self.teacher, self.teacher_channels),
            student_channels=_channels(self.student, self.student_channels),
            teacher_layer=self.teacher_features().layer,
            student_layer=self.student_features().layer,
        )

    def _counted(self) -> Self:
        """With the photographs counted, those of the folder or, where there is none, as many as ImageNet has."""
        from ftfast.distillation.data.photographs import listing

        if listing.LOADERS[self.loader].is_noise:
            found = listing.IMAGENET
        else:
            found = listing.describe(Path(self.data_dir or default_folder()), self.loader)
            if self.classes not in (0, found.classes):
                raise SettingsError(
                    f"classes is {self.classes}, and the photographs have {found.classes}; leave --classes out."
                )
        return dataclasses.replace(
            self,
            classes=self.classes or found.classes,
            train_images=self.train_images or found.train_images,
            test_images=self.test_images or found.test_images,
        )

    def _resolved_dtype(self, device: str) -> str:
        if self.engine == "plain" and self.dtype not in ("auto", "float32"):
            raise SettingsError(f"dtype is {self.dtype!r}; --engine plain computes in float32.")
        if self.sync_batch_norm and device != "cuda":
            raise SettingsError("sync_batch_norm is given, and torch has it on GPUs alone; leave it out on the CPU.")
        if self.dtype == "float16" and device != "cuda":
            raise SettingsError("dtype is 'float16', which takes a GPU; on the CPU take bfloat16 or float32.")
        if self.dtype != "auto" or self.engine == "plain":
            return "float32" if self.dtype == "auto" else self.dtype
        return "bfloat16" if has_bfloat16(device) else "float32"

    def _resolved_compile(self, device: str) -> str:
        if self.compile != "auto":
            return self.compile
        steps = self.student_epochs * steps_of(self.images_of_students(), self.batch_size)
        return "on" if device == "cuda" and steps >= STEPS_WORTH_COMPILING else "off"

    def why_no_graph(self, device: str) -> str:
        """The reason why a training's step is not replayed as a CUDA graph on that device, or none."""
        if device != "cuda":
            return "graphs are CUDA's, and the device is the CPU"
        return "--sync-batch-norm lets the processes talk within the step" if self.sync_batch_norm else ""

    def _resolved_graph(self, device: str) -> str:
        reason = self.why_no_graph(device)
        if self.graph == "on" and reason:
            raise SettingsError(f"graph is 'on', and {reason}; leave --graph out.")
        return "off" if self.graph == "off" or reason else "on"

    def _resolved_device(self) -> str:
        if self.device == "cuda" and not torch.cuda.is_available():
            raise SettingsError("device is 'cuda', and torch finds no CUDA device here; use --device cpu.")
        return self.device if self.device != "auto" else ("cuda" if torch.cuda.is_available() else "cpu")

    def to_json(self) -> dict[str, Any]:
        """A dictionary that JSON keeps as it is, with the format's name and version."""
        return {"format": FORMAT, "version": VERSION, **json.loads(json.dumps(dataclasses.asdict(self)))}

    @classmethod
    def from_json(cls, content: Any) -> Self:
        """The settings that :meth:`to_json` wrote.

        Raises:
            SettingsError: another format, a newer version, an unknown field, or a value that its field does not take.
        """
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise SettingsError(f'these are no settings of ftfast distill: "format" is not "{FORMAT}".')
        version = content.get("version")
        if version != VERSION:
            raise SettingsError(f"the settings have format version {version!r}; this ftfast reads version {VERSION}.")
        values = {name: value for name, value in content.items() if name not in ("format", "version")}
        unknown = sorted(set(values) - set(HINTS))
        if unknown:
            raise SettingsError(f"the settings have an unknown field, {unknown[0]!r}; it takes {', '.join(HINTS)}.")
        if DATASETS.keys() >= {values.get("data")} and DATASETS[values["data"]].is_streamed:
            values = {**decoding.IMAGENET._asdict(), **values}  # which had no name when there were no others
        fields: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in values.items()
        }
        return cls(**fields)


HINTS = typing.get_type_hints(Settings)


def _channels(model: str, channels: int) -> int:
    own = registry.own_channels(model)
    return (channels or own) if own else 0


def _absolute(path: str | None) -> str | None:
    return None if path is None else str(Path(path).absolute())


def _pinned(source: str | None) -> str | None:
    return hub.pinned(source) if source is not None and hub.is_address(source) else _absolute(source)


def schedule_of(settings: Settings, epochs: int) -> Schedule:
    """The settings' schedule, over that many epochs."""
    kind, decay_vectors = settings.learning_rate_schedule, settings.decayed == "all"
    return Schedule.like(settings, epochs=epochs, kind=kind, decay_vectors=decay_vectors)
