"""``ftfast.doctor``: what is slow or wrong in a distillation step, seen by running it once."""

import copy
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ftfast.arguments import has_bfloat16
from ftfast.diagnosis.observed_step import Observed, StepLoss, loss_without, observe
from ftfast.head import FactorTransfer
from ftfast.loss import FTLoss
from ftfast.modules import Translator

# A weight this many times off 500 * sqrt(D / 2048) was meant for another reduction.
LIKELY_FACTOR = 100
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d)


@dataclass(frozen=True)
class Finding:
    """One thing to change.

    Attributes:
        problem: what was seen.
        advice: what to do.
        gain: what that is expected to bring, with what it was measured on; empty where nothing can be said.
        wrong: whether results suffer, and not only time or memory.
    """

    problem: str
    advice: str
    gain: str = ""
    wrong: bool = False

    def __str__(self) -> str:
        gain = f" ({self.gain})" if self.gain else ""
        return f"{'wrong' if self.wrong else 'slow'}: {self.problem}; {self.advice}{gain}."


def doctor(
    student: nn.Module,
    teacher: nn.Module,
    loss: StepLoss,
    batch: Any,
    optimizer: torch.optim.Optimizer | None = None,
) -> list[Finding]:
    """Looks at the modules, the optimiser and one traced step, and says what is slow or wrong.

    Args:
        student, teacher: as the training loop has them, on their device and in their mode.
        loss: the loss of one step, 0-d, called as ``loss(student, teacher, batch)`` and as the loop would: with its
            autocast, its ``no_grad``, its paraphraser and translator inside. It runs several times; parameters, their
            ``.grad``, buffers and torch's random state stay as they were.
        batch: what ``loss`` takes.
        optimizer: the one that steps after it; without it, gradients that nobody uses are not looked for.

    Returns:
        Findings, those that make results wrong first; empty where nothing was found.

    Raises:
        TypeError: student or teacher is no module.
        ValueError: the loss is not a single number, or no parameter gets a gradient from it.
    """
    for name, model in (("student", student), ("teacher", teacher)):
        if not isinstance(model, nn.Module):
            raise TypeError(f"{name} is a {type(model).__name__}; it takes a torch.nn.Module.")
    step = observe(student, teacher, loss, batch)
    if step.loss.numel() != 1:
        raise ValueError(f"loss returned a tensor of shape {tuple(step.loss.shape)}; it takes one number.")
    if not step.reached:
        raise ValueError("loss returned a number that no parameter has a part in; return the step's loss undetached.")
    findings = [
        *_mode(teacher),
        *_optimised_teacher(teacher, optimizer),
        *_weight_units(step),
        *_teacher_graph(teacher, step),
        *_unused_gradients(student, teacher, step, optimizer),
        *_unused_teacher_layers(student, teacher, loss, batch, step),
        *_layout(teacher, step),
        *_dtype(teacher, step),
    ]
    return sorted(findings, key=lambda finding: not finding.wrong)


def _mode(teacher: nn.Module) -> list[Finding]:
    upset = (nn.modules.batchnorm._BatchNorm, nn.modules.dropout._DropoutNd)
    names = [
        name or "itself" for name, module in teacher.named_modules() if module.training and isinstance(module, upset)
    ]
    if not names:
        return []
    return [
        Finding(
            f"the teacher's {names[0]} and {len(names) - 1} more are in train mode, so its features change from batch "
            "to batch and its running statistics drift",
            "call teacher.eval() after every student.train(), or wrap it in ftfast's FrozenTeacher",
            wrong=True,
        )
    ]


def _optimised_teacher(teacher: nn.Module, optimizer: torch.optim.Optimizer | None) -> list[Finding]:
    held = _parameters_of(optimizer)
    count = sum(parameter.numel() for parameter in teacher.parameters() if id(parameter) in held)
    if not count:
        return []
    return [
        Finding(
            f"the optimizer holds {count:,} parameters of the teacher, which weight decay and momentum change",
            "give it the student's and the translator's parameters alone",
            wrong=True,
        )
    ]


def _weight_units(step: Observed) -> list[Finding]:
    findings = []
    for module, size, samples in _losses(step):
        units = {"mean": 1.0, "batchmean": size, "none": size, "sum": size * samples}[module.reduction]
        if module.p != 1 or not isinstance(module.weight, int | float) or not module.weight:
            continue
        usual = 500 * math.sqrt(size / 2048)
        ratio = module.weight * units / usual
        if not 1 / LIKELY_FACTOR <= ratio <= LIKELY_FACTOR:
            findings.append(
                Finding(
                    f"the weight {module.weight:g} with reduction {module.reduction!r} is {ratio:.2g} times the usual "
                    f"one for factors of {size} numbers: betas of 200 to 1000 belong to the mean over N*D",
                    f"take weight={usual / units:.4g}, or reduction='mean' with weight={usual:.4g}",
                    wrong=True,
                )
            )
    return findings


def _losses(step: Observed) -> list[tuple[FTLoss, int, int]]:
    found: list[tuple[FTLoss, int, int]] = []
    seen: set[nn.Module] = set()
    for module, inputs in step.whole.items():
        if isinstance(module, FactorTransfer) and isinstance(module.translator, Translator) and inputs:
            samples, _, *sides = inputs[0].shape
            found.append((module.loss, module.translator.factor_channels * math.prod(sides), samples))
            seen.add(module.loss)
    for call in step.calls:
        if isinstance(call.module, FTLoss) and call.module not in seen and call.inputs:
            seen.add(call.module)
            samples = len(call.inputs[0])
            found.append((call.module, call.inputs[0].numel() // max(samples, 1), samples))
    return found


def _teacher_graph(teacher: nn.Module, step: Observed) -> list[Finding]:
    modules = set(teacher.modules())
    calls = [call for call in step.calls if call.module in modules]
    if not any(call.records_graph for call in calls):
        return []
    reached = {id(tensor) for tensor in step.reached}
    forward = sum(call.seconds for call in calls)
    gain = "its activations are kept until the step's end"
    if any(id(parameter) in reached for parameter in teacher.parameters()):
        gain = f"its backward, about {_share(2 * forward, step)} of this step by twice its forward's time"
    return [Finding("the teacher runs under autograd", "call it inside torch.no_grad()", gain)]


def _unused_gradients(
    student: nn.Module, teacher: nn.Module, step: Observed, optimizer: torch.optim.Optimizer | None
) -> list[Finding]:
    if optimizer is None:
        return []
    known = _parameters_of(optimizer) | {id(parameter) for parameter in teacher.parameters()}
    unused = [tensor for tensor in step.reached if id(tensor) not in known]
    if not unused:
        return []
    of_student = {id(parameter) for parameter in student.parameters()}
    forgotten = [tensor for tensor in unused if id(tensor) in of_student]
    count = sum(tensor.numel() for tensor in unused)
    owner = "the student's among them" if forgotten else "a paraphraser's, or a translator's that should learn"
    return [
        Finding(
            f"gradients of {count:,} numbers that the optimizer does not hold are computed and thrown away, {owner}",
            "give a translator to the optimizer; run a paraphraser under torch.no_grad(), as FactorTransfer does",
            "" if forgotten else f"the backward of layers with {count:,} parameters",
            wrong=bool(forgotten),
        )
    ]


def _unused_teacher_layers(
    student: nn.Module, teacher: nn.Module, loss: StepLoss, batch: Any, step: Observed
) -> list[Finding]:
    modules = set(teacher.modules())
    calls = [call for call in step.calls if call.module in modules]
    repeated = len({call.module for call in calls}) < len(calls)  # a shared ReLU is early and late at once
    order = [call.module for call in calls if not repeated or next(call.module.parameters(), None) is not None]
    if not order or not torch.equal(loss_without(student, teacher, loss, batch, set()), step.loss):
        return []  # a step that gives another loss each time cannot be taken apart

    def idle_from(first: int) -> bool:
        return torch.equal(loss_without(student, teacher, loss, batch, set(order[first:])), step.loss)

    low, high = 0, len(order)  # modules from high on are idle, low - 1 is needed
    while low < high:
        middle = (low + high) // 2
        if idle_from(middle):
            high = middle
        else:
            low = middle + 1
    if low == len(order) or low == 0:
        return []
    idle = set(order[low:])
    seconds = sum(call.seconds for call in calls if call.module in idle)
    names = [name for name, module in teacher.named_modules() if module in idle]
    return [
        Finding(
            f"the teacher's {names[0]}{f' and {len(names) - 1} layers after it' if len(names) > 1 else ''} run for "
            "nothing: the loss does not depend on them",
            "stop at the layer whose features are used, as ftfast.FeatureTap(model, layer, features_only=True) does",
            f"{_share(seconds, step)} of this step",
        )
    ]


def _layout(teacher: nn.Module, step: Observed) -> list[Finding]:
    maps = [call.inputs[0] for call in step.calls if isinstance(call.module, nn.Conv2d) and call.inputs]
    plain = [x for x in maps if x.dim() == 4 and not x.is_contiguous(memory_format=torch.channels_last)]
    if not plain:
        return []
    gain = _measured(teacher, step, lambda model: model.to(memory_format=torch.channels_last), _channels_last)
    return [
        Finding(
            f"{len(plain)} of {len(maps)} convolutions read maps that are not channels_last",
            "call model.to(memory_format=torch.channels_last) on every model and on the images",
            gain,
        )
    ]


def _dtype(teacher: nn.Module, step: Observed) -> list[Finding]:
    calls = [call for call in step.calls if isinstance(call.module, _CONVOLUTIONS) and call.inputs]
    wide = [call for call in calls if call.inputs[0].dtype == torch.float32 and not call.autocasts]
    if not wide or not has_bfloat16(wide[0].inputs[0].device.type) or len(wide) <= len(calls) // 2:
        return []
    gain = _measured(teacher, step, lambda model: model.to(torch.bfloat16), lambda x: x.to(torch.bfloat16))
    return [
        Finding(
            f"{len(wide)} of {len(calls)} convolutions compute in float32",
            "run forward inside torch.autocast(device, torch.bfloat16); FTLoss keeps its sums in float32 there",
            gain,
        )
    ]


def _measured(
    teacher: nn.Module, step: Observed, change: Callable[[nn.Module], nn.Module], cast: Callable[[Tensor], Tensor]
) -> str:
    """How much faster a changed copy of the teacher is, measured here."""
    inputs = step.whole.get(teacher)
    if not inputs or inputs[0].dtype not in (torch.float32, torch.bfloat16):
        return ""
    try:
        plain, changed = copy.deepcopy(teacher), change(copy.deepcopy(teacher))
        before, after = _seconds(plain, inputs), _seconds(changed, [cast(each) for each in inputs])
    except (RuntimeError, TypeError, ValueError):
        return ""  # a model that cannot be copied or cast; the finding stands without a figure
    return f"{before / after:.1f} times on the teacher's forward, measured here" if after < before else ""


def _seconds(model: nn.Module, inputs: list[Tensor]) -> float:
    elapsed = []
    device = inputs[0].device
    with torch.no_grad():
        for _ in range(4):
            begin = time.perf_counter()
            model(*inputs)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            elapsed.append(time.perf_counter() - begin)
    return statistics.median(elapsed[1:])


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x


def _parameters_of(optimizer: torch.optim.Optimizer | None) -> set[int]:
    if optimizer is None:
        return set()
    return {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}


def _share(seconds: float, step: Observed) -> str:
    return f"{100 * min(1.0, seconds / max(step.seconds, 1e-9)):.0f} %"
