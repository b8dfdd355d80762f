"""Every setting of a distillation run: typed, checked and printable."""

import dataclasses
import json
import math
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch

from ftfast.distill import models
from ftfast.distill.data import DATASETS
from ftfast.distill.errors import SettingsError
from ftfast.distill.fields import check, setting
from ftfast.distill.methods import METHODS

FORMAT = "ftfast-settings"
VERSION = 1
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
DEVICES = ("auto", "cpu", "cuda")
OPTIMISERS = ("adam", "sgd")
RECONSTRUCTION_LOSSES = ("l1", "mse")
GRID_STEPS = (0.5, 1.0, 2.0)
ALPHA_GRID = (0.5, 0.7, 0.9)


@dataclass(frozen=True)
class Settings:
    """The settings of one run; the defaults are the recipe for digits. Each field is an option, ``--field-name``.

    Raises:
        SettingsError: a value outside what its field takes.
    """

    data: str = setting("digits", "data set", choices=tuple(DATASETS))
    methods: tuple[str, ...] = setting(("none", "ft", "kd", "ft+kd"), "methods to compare", choices=tuple(METHODS))
    seeds: int = setting(6, "students of each method; a seed fixes a student's weights and its batches", least=1)

    teacher: str = setting("resnet20", "the teacher's model")
    teacher_channels: int = setting(16, "channels of the teacher's first stage", least=1)
    teacher_epochs: int = setting(20, "epochs of the teacher", least=1)
    teacher_checkpoint: str | None = setting(
        None, "a trained teacher: a checkpoint folder, a .safetensors file or a torch file of tensors"
    )
    student: str = setting("resnet8", "the students' model")
    student_channels: int = setting(4, "channels of the students' first stage", least=1)
    student_epochs: int = setting(20, "epochs of a student", least=1)
    student_images: int = setting(300, "training images that the students see; the teacher sees them all", least=1)
    shortcut: str = setting("identity", "shortcuts of all models", choices=models.SHORTCUTS)

    batch_size: int = setting(32, "images in a batch", least=1)
    learning_rate: float = setting(0.05, "of SGD with Nesterov momentum, falling to 0 along a cosine", positive=True)
    momentum: float = setting(0.9, "of SGD", positive=True, most=0.9999)
    weight_decay: float = setting(5e-4, "of SGD", least=0)

    rate: float = setting(0.5, "the paraphraser's k: factor channels over feature channels", positive=True, most=64)
    paraphraser_steps: int = setting(500, "steps of the paraphraser", least=1)
    paraphraser_batch_size: int = setting(128, "feature maps in a step of the paraphraser", least=1)
    paraphraser_optimiser: str = setting("adam", "optimiser of the paraphraser", choices=OPTIMISERS)
    paraphraser_learning_rate: float = setting(3e-3, "its first rate, falling to 0 along a cosine", positive=True)
    paraphraser_loss: str = setting("l1", "reconstruction loss of the paraphraser", choices=RECONSTRUCTION_LOSSES)
    paraphraser_held_out: int = setting(100, "training images on which the paraphraser is judged", least=2)

    beta: tuple[float, ...] = setting(
        (), "weight of the factor transfer loss; of several, one is chosen (default: round 500*sqrt(D/2048))", least=0
    )
    alpha: tuple[float, ...] = setting(
        (), "weight of the soft labels, 0 to 1; of several, one is chosen", least=0, most=1
    )
    temperature: float = setting(4.0, "of the soft labels", positive=True, most=1e4)
    validation_folds: int = setting(
        4, "parts of the students' images, each in turn kept apart to judge weights on", least=2, most=10
    )
    selection_seeds: int = setting(1, "students for each weight and fold", least=1)

    seed: int = setting(0, "of the teacher and the paraphraser", least=0)
    device: str = setting("auto", "where to compute", choices=DEVICES)
    dtype: str = setting(
        "auto", "of the models' arithmetic (default: bfloat16 where the hardware has it)", choices=("auto", *DTYPES)
    )
    threads: int = setting(
        1, "threads on the CPU, 0 for torch's choice; digits are too small for more than one", least=0, most=4096
    )

    def __post_init__(self) -> None:
        for item in dataclasses.fields(self):
            check(item, HINTS[item.name], getattr(self, item.name))
        for name in ("methods", "beta", "alpha"):
            values = getattr(self, name)
            if len(set(values)) != len(values):
                raise SettingsError(f"{name} names {', '.join(map(str, values))}; give each value once.")
        if not self.methods:
            raise SettingsError(f"methods is empty; it takes some of {', '.join(METHODS)}, separated by commas.")
        for name in (self.teacher, self.student):
            models.parse_depth(name)
        self._check_image_counts()
        self._check_folds()

    def _check_folds(self) -> None:
        fewest = DATASETS[self.data].classes * self.validation_folds
        if len(self.weight_grid()) > 1 and self.student_images < fewest:
            raise SettingsError(
                f"student_images is {self.student_images}; to choose weights on {self.validation_folds} folds it takes "
                f"at least {fewest}: give more images, a lower --validation-folds, or one --beta and one --alpha."
            )

    def _check_image_counts(self) -> None:
        dataset = DATASETS[self.data]
        for name, whole in (
            ("student_images", dataset.train_images),
            ("paraphraser_held_out", dataset.train_images),
        ):
            value = getattr(self, name)
            is_all = name == "student_images" and value == whole
            if not is_all and not dataset.classes <= value <= whole - dataset.classes:
                raise SettingsError(
                    f"{name} is {value}; it takes {dataset.classes} to {whole - dataset.classes}, "
                    f"so that each of {dataset.classes} classes is on both sides of the cut."
                )

    def factor_size(self) -> int:
        """D, the numbers in one factor."""
        channels, height, width = models.feature_shape(self.teacher_channels, DATASETS[self.data].image_shape[1:])
        return max(1, round(channels * self.rate)) * height * width

    def weight_grid(self) -> list[tuple[float, float]]:
        """The (beta, alpha) pairs that ``ft+kd`` tries; ``ft`` and ``kd`` try the betas and the alphas of them.

        A weight that none of the methods has stands at 0.
        """
        used = {weight for method in self.methods for weight in METHODS[method].weights}
        beta = self._betas() if "beta" in used else (0.0,)
        alpha = (self.alpha or ALPHA_GRID) if "alpha" in used else (0.0,)
        if 1 not in (len(beta), len(alpha)) and len(beta) != len(alpha):
            raise SettingsError(
                f"beta has {len(beta)} values and alpha {len(alpha)}; give one value or equally many, "
                "so that every method chooses from a grid of the same size."
            )
        count = max(len(beta), len(alpha))
        return list(zip(beta * (count // len(beta)), alpha * (count // len(alpha)), strict=True))

    def _betas(self) -> tuple[float, ...]:
        centre = 500 * math.sqrt(self.factor_size() / 2048)  # the mean form shrinks like 1/sqrt(D); 500 suits CIFAR
        return self.beta or tuple(round(centre * step, 4) for step in GRID_STEPS)

    def resolved(self) -> Self:
        """The same settings with nothing left to the machine: device, dtype, threads and the grids of weights."""
        device = self._resolved_device()
        checkpoint = self.teacher_checkpoint
        return dataclasses.replace(
            self,
            device=device,
            dtype=self.dtype if self.dtype != "auto" else ("bfloat16" if _has_bfloat16(device) else "float32"),
            threads=self.threads or torch.get_num_threads(),
            beta=self._betas(),
            alpha=self.alpha or ALPHA_GRID,
            teacher_checkpoint=None if checkpoint is None else str(Path(checkpoint).absolute()),
        )

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
        fields: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in values.items()
        }
        return cls(**fields)


HINTS = typing.get_type_hints(Settings)


def _has_bfloat16(device: str) -> bool:
    if device == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    # Emulated bfloat16 is slower than float32, so only processors with instructions of their own count.
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return any(value is True for name, value in capabilities.items() if name.endswith("bf16"))
