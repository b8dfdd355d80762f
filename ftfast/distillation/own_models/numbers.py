"""The arguments of ftfast.distill that are numbers and names: what they take, and what they mean."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any, Self

import torch
from torch import nn

from ftfast.arguments import has_bfloat16
from ftfast.distillation.models.frozen_teacher import LIMITS
from ftfast.distillation.settings.fields import check_fields, setting
from ftfast.distillation.training.methods import METHODS
from ftfast.distillation.training.schedule import CUSTOMARY, Schedule
from ftfast.distillation.training.step.step import Precision
from ftfast.distillation.training.terms import WEIGHTS, Weights
from ftfast.errors import SettingsError, shown
from ftfast.modules import Paraphraser

_SWITCHES = ("resize_features", "graph", "resume", "progress")


@dataclass(frozen=True)
class Numbers:
    """The arguments that are numbers and names, and what they take."""

    epochs: int = setting(20, "", least=1)
    rate: float = setting(0.5, "", positive=True, most=64)
    optimizer: str = setting("sgd", "", choices=tuple(CUSTOMARY))
    learning_rate: float = setting(0.05, "", positive=True)
    momentum: float = setting(0.9, "", least=0, most=0.9999)
    weight_decay: float = setting(5e-4, "", least=0)
    warm_up: float = setting(0.0, "", least=0)
    schedule: str = setting("cosine", "", choices=("cosine", "steps"))
    milestones: tuple[int, ...] = setting((), "", least=1)
    gamma: float = setting(0.1, "", positive=True, most=1)
    clip_gradient: float | None = setting(None, "", positive=True)
    ema: float | None = setting(None, "", positive=True, most=1)
    seed: int = setting(0, "", least=0)
    checkpoint_seconds: float = setting(30.0, "", least=0)

    def __post_init__(self) -> None:
        check_fields(self)
        if self.schedule == "steps" and not self.milestones:
            raise SettingsError("schedule is 'steps' and milestones is empty; give epochs after which the rate falls.")

    @classmethod
    def of(cls, arguments: Mapping[str, Any]) -> Self:
        """Those among the arguments of ftfast.distill; a rate or decay of None is the optimizer's customary one.

        Raises:
            SettingsError: a value outside what is taken.
        """
        for name in _SWITCHES:
            if not isinstance(arguments[name], bool):
                raise SettingsError(f"{name} is {shown(repr(arguments[name]))}; it takes True or False.")
        if (optimizer := arguments["optimizer"]) not in tuple(CUSTOMARY):
            raise SettingsError(f"optimizer is {optimizer!r}; it takes {' or '.join(CUSTOMARY)}.")
        values: dict[str, Any] = {item.name: arguments[item.name] for item in fields(cls)}
        if not isinstance(milestones := values["milestones"], Iterable):
            raise SettingsError(f"milestones is {milestones!r}; it takes a list of int values.")
        values["milestones"] = tuple(milestones)
        own = CUSTOMARY[optimizer]._asdict()
        return cls(**values | {name: own[name] for name in own.keys() & values.keys() if values[name] is None})

    def to_schedule(self, batch_size: int) -> Schedule:
        """Of a training in batches of that many images."""
        decay_vectors, optimiser = CUSTOMARY[self.optimizer].decay_vectors, self.optimizer
        return Schedule.like(
            self, batch_size=batch_size, kind=self.schedule, decay_vectors=decay_vectors, optimiser=optimiser
        )


def given_weights(method: str, beta: float | None, weights: Mapping[str, float] | None) -> Weights:
    """The weights that were given, by name.

    Raises:
        SettingsError: an unknown method or weight, or a value that it does not take.
    """
    taken = [name for name, each in METHODS.items() if each.control is None]  # controls are trained by a whole run
    if method not in taken:
        raise SettingsError(f"method is {method!r}; it takes {', '.join(taken)}.")
    if weights is not None and not isinstance(weights, Mapping):
        raise SettingsError(f"weights is {shown(repr(weights))}; it takes a dictionary of numbers by name.")
    given = dict(weights or {})
    if beta is not None and "beta" in given:
        raise SettingsError(f"beta is {beta} and weights has {given['beta']}; give one of them.")
    given |= {} if beta is None else {"beta": beta}
    for name, value in given.items():
        if name not in WEIGHTS and name != "temperature":
            raise SettingsError(f"weights has {name!r}; it takes {', '.join(WEIGHTS)} and temperature.")
        most = WEIGHTS[name].most if name in WEIGHTS else math.inf
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not 0 <= value <= most or math.isinf(value) or (name == "temperature" and not value):
            raise SettingsError(f"{name} is {value!r}; it takes a positive number{f' up to {most:g}' * (most < 9)}.")
    return given


def precision_of(device: torch.device | str | None, dtype: torch.dtype | None, student: nn.Module) -> Precision:
    if device is None:
        own = next(student.parameters()).device
        device = own if own.type != "cpu" or not torch.cuda.is_available() else "cuda"
    try:
        home = torch.device(device)
    except (RuntimeError, TypeError):  # of words that torch does not know, and of what is none
        home = None
    if home is None or home.type not in ("cpu", "cuda") or (home.type == "cuda" and not torch.cuda.is_available()):
        raise SettingsError(
            f"device is {shown(repr(str(device)))}; it takes 'cpu' or, where torch finds one, a CUDA device."
        )
    if dtype is None:
        dtype = torch.bfloat16 if has_bfloat16(home.type) else torch.float32
    if dtype not in tuple(LIMITS) or (dtype == torch.float16 and home.type == "cpu"):
        raise SettingsError(f"dtype is {dtype}; it takes torch.float32, torch.bfloat16 or, on a GPU, torch.float16.")
    return Precision(home, dtype)


def check_paraphraser(paraphraser: Paraphraser, channels: int) -> int:
    """The channels of its factors; raises where it is none for a teacher's maps of so many channels."""
    if not isinstance(paraphraser, Paraphraser):
        raise TypeError(f"paraphraser is a {type(paraphraser).__name__}; it takes a Paraphraser or None.")
    if paraphraser.in_channels != channels:
        raise SettingsError(
            f"paraphraser takes {paraphraser.in_channels} channels and teacher_layer gives {channels}; give one that "
            "was trained on this layer, or None."
        )
    return paraphraser.factor_channels
