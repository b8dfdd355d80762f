"""One step of training: forward, backward and SGD over everything that learns, with nothing waited for on the way."""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ftfast.distillation.models.registry import Outputs
from ftfast.distillation.monitor.step_clock import is_timed, timed
from ftfast.distillation.runtime.processes import ALONE, Processes, translate_distributed_errors
from ftfast.distillation.training.methods import Terms
from ftfast.distillation.training.schedule import Schedule
from ftfast.distillation.training.step.average import Average
from ftfast.distillation.training.step.gradients import FlatGradients, data_parallel
from ftfast.distillation.training.step.graph import StepGraph


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
        average: of the ``model`` in ``trainable``, which follows every step.
        replayed: on a GPU as a CUDA graph; of many processes as two, between which their gradients are summed.
        frozen: what the terms read beside what learns, whose writes a graph is to notice.
        say: takes the reason why a step is not replayed.
    """

    def __init__(
        self,
        trainable: nn.Module,
        terms: Callable[..., Terms],
        schedule: Schedule,
        precision: Precision,
        processes: Processes = ALONE,
        *,
        average: Average | None = None,
        replayed: bool = False,
        frozen: Iterable[nn.Module] = (),
        say: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._terms = terms
        self._schedule = schedule
        self._precision = precision
        self._ranks = processes.part.ranks
        self._trainable, self._average = trainable, average
        self._parameters = [parameter for parameter in trainable.parameters() if parameter.requires_grad]
        self._shared: DistributedDataParallel | None = None
        self._flat: FlatGradients | None = None
        if processes.are_many and replayed:
            self._flat = FlatGradients(self._parameters, processes)
        elif processes.are_many:
            self._terms = self._shared = data_parallel(trainable, terms)
        self.optimiser = _optimiser(parameter_groups(self._parameters, schedule), schedule, precision.device)
        self._scaler = torch.amp.GradScaler(precision.device.type, enabled=precision.dtype == torch.float16)
        self._rate = schedule.learning_rate
        self._parts: list[Callable[..., Any]] = [self._whole]
        if self._flat is not None:
            self._parts = [self._find_gradients, self._descend]
        self._graphs: list[StepGraph] = []
        if replayed:
            read, optimizers = tuple(frozen), [self.optimiser]
            for part in self._parts:
                graph = StepGraph(part, optimizers=optimizers, frozen=read, device=precision.device, say=say)
                self._graphs.append(graph)

    def __call__(self, batch: tuple[Tensor, ...], learning_rate: float, whole: int | None = None) -> Terms:
        """One step; returns the terms' values, on the device and detached; the next step may write to them.

        Args:
            batch: this process's part of it.
            whole: the images of the batch over all processes; the mean of the returned values over the processes is
                then the mean over these.

        Raises:
            LostProcessError: another process is gone.
        """
        self._rate = learning_rate
        for group in self.optimiser.param_groups:
            group["lr"] = learning_rate
        # A sampled step waits for the device between its parts, as no graph can.
        run = [graph.eagerly if is_timed() else graph for graph in self._graphs] or self._parts
        values: Terms = run[0](*batch, whole or len(batch[0]))
        if self._flat is not None:
            self._flat.reduce()
            run[1]()
        if self._average is not None:
            self._average.n_averaged += 1
        return values

    def _whole(self, *batch: Any) -> Terms:
        values = self._find_gradients(*batch)
        self._descend()
        return values

    def _find_gradients(self, *given: Any) -> Terms:
        """Forward and backward of a batch, whose images over all processes are given last."""
        *batch, whole = given
        self.optimiser.zero_grad(set_to_none=True)
        values: Terms = {}
        split = zip(*(tensor.tensor_split(self._schedule.accumulate) for tensor in batch), strict=True)
        parts = [part for part in split if len(part[0])]
        for place, part in enumerate(parts):
            share = len(part[0]) * self._ranks / whole
            is_last = place == len(parts) - 1
            # The processes' gradients meet once, in the backward of the last part.
            with (
                translate_distributed_errors(),
                nullcontext() if self._shared is None or is_last else self._shared.no_sync(),
            ):
                with self._precision.autocast():
                    terms = self._terms(*part)
                    loss = torch.stack(list(terms.values())).sum()
                with timed("backward"):
                    self._scaler.scale(loss if share == 1 else loss * share).backward()
            for name, value in terms.items():
                weighted = value.detach() if share == 1 else value.detach() * share
                values[name] = values[name] + weighted if name in values else weighted
        if self._flat is not None:
            self._flat.gather()
        return values

    def _descend(self) -> None:
        """The optimiser's step down the gradients that are there, and the average's after it."""
        with timed("optimiser"):
            if self._schedule.clip_gradient is not None:
                self._scaler.unscale_(self.optimiser)
                nn.utils.clip_grad_norm_(self._parameters, self._schedule.clip_gradient)
            self._scaler.step(self.optimiser)
            self._scaler.update()
            if self._average is not None:
                self._average.update_parameters(self._trainable.get_submodule("model"))

    def on_stream(self) -> AbstractContextManager[None]:
        """Inside, a GPU's work goes to the stream of the steps that are replayed."""
        device = self._precision.device
        return self._graphs[0].stream(device) if self._graphs and device.type == "cuda" else nullcontext()

    def forget(self) -> None:
        """Drops the graphs and their memory."""
        for graph in self._graphs:
            graph.forget()

    def figures(self) -> dict[str, float]:
        """``learning_rate`` of the last step and, in float16, the scaler's ``loss_scale``, which waits for a GPU."""
        scale = {"loss_scale": float(self._scaler.get_scale())} if self._scaler.is_enabled() else {}
        return {"learning_rate": self._rate, **scale}

    def state(self) -> dict[str, Any]:
        """What :meth:`load_state` takes: of the optimiser and, in float16, of the scaler."""
        scaler, optimiser = self._scaler.state_dict(), self.optimiser.state_dict()
        groups = [{**group, "lr": self._rate} for group in optimiser["param_groups"]]
        return {"optimiser": {**optimiser, "param_groups": groups}, **({"scaler": scaler} if scaler else {})}

    def load_state(self, state: dict[str, Any]) -> None:
        """Goes on from where :meth:`state` was taken; what was recorded before is dropped."""
        options = [{**group} for group in self.optimiser.param_groups]  # the schedule's, whatever the state was of
        self.optimiser.load_state_dict(state["optimiser"])
        for group, own in zip(self.optimiser.param_groups, options, strict=True):
            group.update(own)
        self._rate = float(state["optimiser"]["param_groups"][0]["lr"])
        if "scaler" in state:
            self._scaler.load_state_dict(state["scaler"])


def _optimiser(groups: list[dict[str, Any]], schedule: Schedule, device: torch.device) -> torch.optim.Optimizer:
    is_captured = device.type == "cuda"
    if schedule.optimiser == "adam":
        return torch.optim.Adam(groups, lr=schedule.learning_rate, fused=True, capturable=is_captured)
    if schedule.optimiser == "adamw":
        betas = (schedule.momentum, 0.999)
        return torch.optim.AdamW(groups, schedule.learning_rate, betas, fused=True, capturable=is_captured)
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
            with timed("teacher"):
                taught = self._teacher(images)
            with timed("student"):
                return self._student(images), taught
        aside = self._streams.setdefault(images.device, torch.cuda.Stream(images.device))
        current = torch.cuda.current_stream(images.device)
        aside.wait_stream(current)
        with timed("teacher"), torch.cuda.stream(aside):
            taught = self._teacher(images)
        with timed("student"):
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
