"""One step of training: forward, backward and SGD over everything that learns, with nothing waited for on the way."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ftfast.distill.errors import IN_A_NEW_RUN, DistillError
from ftfast.distill.methods import Outputs, Terms
from ftfast.distill.schedule import Schedule

# Losses are looked at this often: on a GPU each look waits for all steps before it.
STEPS_BETWEEN_LOOKS = 50


class DivergedError(DistillError):
    """A training whose loss is no longer finite."""


@dataclass(frozen=True)
class Precision:
    """Where the models compute, and in which dtype; parameters stay float32."""

    device: torch.device
    dtype: torch.dtype

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)


class LearningStep:
    """Steps of SGD on the sum of named loss terms; student and translator share one fused optimiser.

    Args:
        learner: everything that learns.
        terms: images ``[N, C, H, W]`` and labels ``[N]`` to the named terms, each the mean over the batch.
        schedule, precision: see there; float16 gets a gradient scaler.
    """

    def __init__(
        self, learner: nn.Module, terms: Callable[[Tensor, Tensor], Terms], schedule: Schedule, precision: Precision
    ) -> None:
        self._terms = terms
        self._schedule = schedule
        self._precision = precision
        self._parameters = [parameter for parameter in learner.parameters() if parameter.requires_grad]
        self.optimiser = torch.optim.SGD(
            parameter_groups(self._parameters, schedule),
            lr=schedule.learning_rate,
            momentum=schedule.momentum,
            nesterov=schedule.nesterov and schedule.momentum > 0,
            fused=True,
        )
        self._scaler = torch.amp.GradScaler(precision.device.type, enabled=precision.dtype == torch.float16)

    def __call__(self, images: Tensor, labels: Tensor, learning_rate: float) -> Terms:
        """One step; returns the terms' values, on the device and detached."""
        for group in self.optimiser.param_groups:
            group["lr"] = learning_rate
        self.optimiser.zero_grad(set_to_none=True)
        values: Terms = {}
        parts = self._schedule.accumulate
        for part_images, part_labels in zip(images.tensor_split(parts), labels.tensor_split(parts), strict=True):
            share = len(part_labels) / len(labels)
            if not share:
                continue
            with self._precision.autocast():
                terms = self._terms(part_images, part_labels)
                loss = torch.stack(list(terms.values())).sum()
            self._scaler.scale(loss if share == 1 else loss * share).backward()
            for name, value in terms.items():
                part = value.detach() if share == 1 else value.detach() * share
                values[name] = values[name] + part if name in values else part
        if self._schedule.clip_gradient is not None:
            self._scaler.unscale_(self.optimiser)
            nn.utils.clip_grad_norm_(self._parameters, self._schedule.clip_gradient)
        self._scaler.step(self.optimiser)
        self._scaler.update()
        return values

    def state(self) -> dict[str, Any]:
        """What :meth:`load_state` takes: of the optimiser and, in float16, of the scaler."""
        scaler = self._scaler.state_dict()
        return {"optimiser": self.optimiser.state_dict(), **({"scaler": scaler} if scaler else {})}

    def load_state(self, state: dict[str, Any]) -> None:
        """Goes on from where :meth:`state` was taken."""
        self.optimiser.load_state_dict(state["optimiser"])
        if "scaler" in state:
            self._scaler.load_state_dict(state["scaler"])


def parameter_groups(parameters: list[nn.Parameter], schedule: Schedule) -> list[dict[str, Any]]:
    """One group with weight decay, and where the schedule spares vectors, one without."""
    if schedule.decay_vectors:
        return [{"params": parameters, "weight_decay": schedule.weight_decay}]
    decayed = [parameter for parameter in parameters if parameter.dim() > 1]
    spared = [parameter for parameter in parameters if parameter.dim() <= 1]
    groups = [
        {"params": decayed, "weight_decay": schedule.weight_decay},
        {"params": spared, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


class LossRecord:
    """Means of loss terms over an epoch, summed on the device and looked at every so many steps."""

    def __init__(self, sums: dict[str, Tensor] | None = None) -> None:
        self.sums = dict(sums or {})
        self._unseen: list[Tensor] = []

    def add(self, terms: Terms, images: int, step: int) -> None:
        """Takes a step's terms; ``step`` is counted from 0 over all epochs.

        Raises:
            DivergedError: one of the last steps had a loss that is not finite.
        """
        for name, value in terms.items():
            self.sums[name] = self.sums.get(name, 0) + value * images
        self._unseen.append(torch.stack(list(terms.values())).sum())
        if len(self._unseen) == STEPS_BETWEEN_LOOKS:
            self.look(step)

    def look(self, step: int) -> None:
        """Waits for the device and checks every loss since the last look, ``step`` being the latest."""
        losses, self._unseen = torch.stack(self._unseen).tolist() if self._unseen else [], []
        for place, loss in enumerate(losses):
            if not math.isfinite(loss):
                at = step - len(losses) + 1 + place
                raise DivergedError(
                    f"the loss is {loss} at step {at + 1}; the last checkpoint before it is kept. Lower "
                    f"--learning-rate or the weights of the loss, or set --clip-gradient, {IN_A_NEW_RUN} once that is "
                    "there."
                )

    def means(self, images: int) -> dict[str, float]:
        """The terms by name, each a mean over the images."""
        return {name: float(total) / images for name, total in self.sums.items()}


class BesideStudent:
    """Runs a frozen teacher while the student's forward runs: on a GPU on a stream of its own, else before it.

    Args:
        teacher: images to its outputs, without a graph.
        student: images to its outputs.
    """

    def __init__(self, teacher: Callable[[Tensor], Outputs], student: Callable[[Tensor], Outputs]) -> None:
        self._teacher = teacher
        self._student = student
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    def __call__(self, images: Tensor) -> tuple[Outputs, Outputs]:
        """The student's outputs and the teacher's."""
        if images.device.type != "cuda":
            taught = self._teacher(images)
            return self._student(images), taught
        aside = self._streams.setdefault(images.device, torch.cuda.Stream(images.device))
        current = torch.cuda.current_stream(images.device)
        aside.wait_stream(current)
        with torch.cuda.stream(aside):
            taught = self._teacher(images)
        found = self._student(images)
        current.wait_stream(aside)
        images.record_stream(aside)
        for tensor in taught:
            tensor.record_stream(current)
        return found, taught
