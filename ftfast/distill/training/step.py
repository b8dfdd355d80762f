"""One step of training: forward, backward and SGD over everything that learns, with nothing waited for on the way."""

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ftfast.distill.models.registry import Outputs
from ftfast.distill.monitor.step_clock import timed as timed_part
from ftfast.distill.runtime.processes import ALONE, Processes, translate_distributed_errors
from ftfast.distill.training.methods import Terms
from ftfast.distill.training.schedule import Schedule


@dataclass(frozen=True)
class Precision:
    """Where the models compute, and in which dtype; parameters stay float32."""

    device: torch.device
    dtype: torch.dtype

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)


class LearningStep:
    """Steps of gradient descent on the sum of named loss terms; student and translator share one fused optimiser.

    Args:
        trainable: everything that learns.
        terms: a batch, its images ``[N, C, H, W]`` and labels first, to the named terms, each the mean over the batch.
        schedule, precision: see there; float16 gets a gradient scaler.
        processes: those that share every batch; they step with the mean of their gradients.
    """

    def __init__(
        self,
        trainable: nn.Module,
        terms: Callable[..., Terms],
        schedule: Schedule,
        precision: Precision,
        processes: Processes = ALONE,
    ) -> None:
        self._terms = terms
        self._schedule = schedule
        self._precision = precision
        self._ranks = processes.part.ranks
        self._parameters = [parameter for parameter in trainable.parameters() if parameter.requires_grad]
        self._shared = None
        if processes.are_many:
            # Running statistics are looked at in evaluation alone, which takes the first process's: none travel here.
            self._shared = DistributedDataParallel(
                _Loss(trainable, terms), gradient_as_bucket_view=True, broadcast_buffers=False
            )
            self._terms = self._shared
        self.optimiser = _optimiser(parameter_groups(self._parameters, schedule), schedule)
        self._scaler = torch.amp.GradScaler(precision.device.type, enabled=precision.dtype == torch.float16)

    def __call__(self, batch: tuple[Tensor, ...], learning_rate: float, whole: int | None = None) -> Terms:
        """One step; returns the terms' values, on the device and detached.

        Args:
            batch: this process's part of it.
            whole: the images of the batch over all processes; the mean of the returned values over the processes is
                then the mean over these.

        Raises:
            LostProcessError: another process is gone.
        """
        for group in self.optimiser.param_groups:
            group["lr"] = learning_rate
        self.optimiser.zero_grad(set_to_none=True)
        values: Terms = {}
        split = zip(*(tensor.tensor_split(self._schedule.accumulate) for tensor in batch), strict=True)
        parts = [part for part in split if len(part[0])]
        for place, part in enumerate(parts):
            share = len(part[0]) * self._ranks / (whole or len(batch[0]))
            is_last = place == len(parts) - 1
            # The processes' gradients meet once, in the backward of the last part.
            with (
                translate_distributed_errors(),
                nullcontext() if self._shared is None or is_last else self._shared.no_sync(),
            ):
                with self._precision.autocast():
                    terms = self._terms(*part)
                    loss = torch.stack(list(terms.values())).sum()
                with timed_part("backward"):
                    self._scaler.scale(loss if share == 1 else loss * share).backward()
            for name, value in terms.items():
                weighted = value.detach() if share == 1 else value.detach() * share
                values[name] = values[name] + weighted if name in values else weighted
        with timed_part("optimiser"):
            if self._schedule.clip_gradient is not None:
                self._scaler.unscale_(self.optimiser)
                nn.utils.clip_grad_norm_(self._parameters, self._schedule.clip_gradient)
            self._scaler.step(self.optimiser)
            self._scaler.update()
        return values

    def figures(self) -> dict[str, float]:
        """``learning_rate`` of the last step and, in float16, the scaler's ``loss_scale``, which waits for a GPU."""
        scale = {"loss_scale": float(self._scaler.get_scale())} if self._scaler.is_enabled() else {}
        return {"learning_rate": float(self.optimiser.param_groups[0]["lr"]), **scale}

    def state(self) -> dict[str, Any]:
        """What :meth:`load_state` takes: of the optimiser and, in float16, of the scaler."""
        scaler = self._scaler.state_dict()
        return {"optimiser": self.optimiser.state_dict(), **({"scaler": scaler} if scaler else {})}

    def load_state(self, state: dict[str, Any]) -> None:
        """Goes on from where :meth:`state` was taken."""
        self.optimiser.load_state_dict(state["optimiser"])
        if "scaler" in state:
            self._scaler.load_state_dict(state["scaler"])


class _Loss(nn.Module):
    """The terms as the forward of the module that learns, which is what torch's data parallelism wraps."""

    def __init__(self, trainable: nn.Module, terms: Callable[..., Terms]) -> None:
        super().__init__()
        self.trainable = trainable
        self._terms = terms

    def forward(self, *batch: Tensor) -> Terms:
        return self._terms(*batch)


def _optimiser(groups: list[dict[str, Any]], schedule: Schedule) -> torch.optim.Optimizer:
    if schedule.optimiser == "adam":
        return torch.optim.Adam(groups, lr=schedule.learning_rate, fused=True)
    return torch.optim.SGD(
        groups,
        lr=schedule.learning_rate,
        momentum=schedule.momentum,
        nesterov=schedule.nesterov and schedule.momentum > 0,
        fused=True,
    )


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
            with timed_part("teacher"):
                taught = self._teacher(images)
            with timed_part("student"):
                return self._student(images), taught
        aside = self._streams.setdefault(images.device, torch.cuda.Stream(images.device))
        current = torch.cuda.current_stream(images.device)
        aside.wait_stream(current)
        with timed_part("teacher"), torch.cuda.stream(aside):
            taught = self._teacher(images)
        with timed_part("student"):
            found = self._student(images)
        current.wait_stream(aside)
        images.record_stream(aside)
        for tensor in taught:
            tensor.record_stream(current)
        return found, taught


class RunningStatistics:
    """Those of some modules, which one batch with infinities would make NaN for good.

    The scaler leaves the step of such a batch out, but its forward has been through the batch norms.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        buffers = (buffer for module in modules for buffer in module.buffers())
        self._running = [buffer for buffer in buffers if buffer.is_floating_point()]
        self._kept = self._copies()

    def _copies(self) -> list[Tensor]:
        return [buffer.detach().clone() for buffer in self._running]

    @torch.no_grad()
    def restore_finite(self) -> None:
        """What is not finite goes back to what it was at the call before; nothing is waited for."""
        for buffer, kept in zip(self._running, self._kept, strict=True):
            buffer.copy_(torch.where(buffer.isfinite(), buffer, kept))
        self._kept = self._copies()
