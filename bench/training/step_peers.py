"""A whole distillation step, the ways to compute it, and what judges them against float32."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

import ftfast
from bench.harness import gate
from bench.peers import official_formula
from ftfast import FeatureTap
from ftfast.distillation.models import registry
from ftfast.distillation.models.frozen_teacher import FrozenTeacher
from ftfast.distillation.phases.setup import precision_of
from ftfast.distillation.phases.trainable import TeacherSide, trainable_of
from ftfast.distillation.runtime.processes import ALONE, Processes
from ftfast.distillation.runtime.seeds import seeded
from ftfast.distillation.settings.run_settings import Settings, schedule_of
from ftfast.distillation.training.step.graph import WARM_UPS
from ftfast.distillation.training.step.step import LearningStep
from ftfast.distillation.training.terms import Weights

BETA = 500.0
RESIDUAL_SCALE = 0.2
NORM_IMAGES = 1024  # over an image's side: how many a batch norm sees at once before the start
RATE = 0.1
SGD = {"lr": RATE, "momentum": 0.9, "weight_decay": 5e-4}


@dataclass(frozen=True)
class Pair:
    """A teacher and a student by the names that ``ftfast distill`` takes, and the images and classes they get.

    Attributes:
        channels: of the first stage; 0 for a library's models.
        size: pixels of an image's side.
    """

    teacher: str
    student: str
    channels: int
    size: int
    classes: int

    @property
    def title(self) -> str:
        return f"{self.teacher.rpartition('/')[2]} to {self.student.rpartition('/')[2]}"

    def features(self, model: str) -> registry.FeatureMap:
        """A model's last feature map."""
        return registry.feature_map(model, self.channels, "identity", (3, self.size, self.size))


CIFAR = Pair("resnet56", "resnet20", 16, 32, 10)
SMALL = Pair("resnet20", "resnet8", 16, 32, 10)
IMAGENET = Pair("torchvision/resnet34", "torchvision/resnet18", 0, 224, 1000)


@dataclass(frozen=True)
class Step:
    """One way to do the step: called, it does one and returns the loss.

    Attributes:
        run: the step.
        student: whose gradients are compared.
        optimiser: the student's; its gradients are read before it steps.
        note: what was done to the teacher, where that is known.
        warm_ups: calls after the first until it runs as it does from then on.
    """

    run: Callable[[], Tensor]
    student: nn.Module
    optimiser: torch.optim.Optimizer
    note: str = ""
    warm_ups: int = 0


class Operands:
    """The networks as every way gets them, drawn from a seed, and one batch of synthetic images and labels."""

    def __init__(self, pair: Pair, batch: int, device: torch.device, seed: int) -> None:
        self.pair, self.device, self.seed = pair, device, seed
        self.taught, self.found = pair.features(pair.teacher), pair.features(pair.student)
        generator = torch.Generator().manual_seed(seed)
        self.images = torch.randn(batch, 3, pair.size, pair.size, generator=generator).to(device)
        self.labels = torch.randint(pair.classes, (batch,), generator=generator).to(device)
        self._teacher = self._model(pair.teacher, seed)
        with seeded(seed):
            self._paraphraser = ftfast.Paraphraser(self.taught.channels)
            self._translator = ftfast.Translator(self.found.channels, self._paraphraser.factor_channels)
        self._teacher.train()
        for name, parameter in self._teacher.named_parameters():
            if name.endswith("bn2.weight"):  # small residuals, as training leaves them: noise does not grow with depth
                nn.init.constant_(parameter, RESIDUAL_SCALE)
        with torch.no_grad():  # batch norms that have seen images, as a teacher's have
            for _ in range(8):
                self._teacher(torch.randn(NORM_IMAGES // pair.size, 3, pair.size, pair.size, generator=generator))
        self._teacher.eval()

    def teacher(self) -> nn.Module:
        """In eval, its parameters still asking for gradients, as a checkpoint is loaded."""
        return copy.deepcopy(self._teacher).to(self.device)

    def paraphraser(self) -> ftfast.Paraphraser:
        """The teacher's paraphraser, in eval."""
        return copy.deepcopy(self._paraphraser).to(self.device).eval()

    def translator(self) -> ftfast.Translator:
        """The student's translator."""
        return copy.deepcopy(self._translator).to(self.device)

    def student(self) -> nn.Module:
        """A student in train mode."""
        return self._model(self.pair.student, self.seed + 1).to(self.device)

    def _model(self, name: str, seed: int) -> nn.Module:
        return registry.build_model(name, self.pair.channels, in_channels=3, classes=self.pair.classes, seed=seed)


def _encode(network: Any, x: Tensor) -> Tensor:
    for layer in network.encoder:
        x = F.leaky_relu(F.conv2d(x, layer.weight, layer.bias, stride=1, padding=1), network.negative_slope)
    return x


def official(with_: Operands) -> Step:
    """float32, NCHW, teacher and paraphraser under autograd, the factor detached at the end, two optimisers."""
    teacher = FeatureTap(with_.teacher(), with_.taught.layer)
    student = FeatureTap(with_.student(), with_.found.layer)
    paraphraser, translator = with_.paraphraser(), with_.translator()
    optimisers = [
        torch.optim.SGD(network.parameters(), **SGD, nesterov=True)  # type: ignore[arg-type]
        for network in (student, translator)
    ]

    def run() -> Tensor:
        _, taught = teacher(with_.images)
        factor = _encode(paraphraser, taught)
        logits, features = student(with_.images)
        loss = F.cross_entropy(logits, with_.labels)
        loss = loss + BETA * official_formula(_encode(translator, features), factor.detach())
        for optimiser in optimisers:
            optimiser.zero_grad()
        loss.backward()
        for optimiser in optimisers:
            optimiser.step()
        return loss.detach()

    return Step(run, student.model, optimisers[0])


# Names of convolutions and the batch norms behind them: our ResNets', then torchvision's.
_CONVOLUTIONS = (
    *(("stem", "norm"), ("conv1", "norm1"), ("conv2", "norm2")),
    *(("conv1", "bn1"), ("conv2", "bn2"), ("0", "1")),
)


def _folded(resnet: nn.Module) -> nn.Module:
    """The same with every batch norm in the convolution before it."""
    for module in list(resnet.modules()):
        for convolution, norm in _CONVOLUTIONS:
            if isinstance(getattr(module, norm, None), nn.BatchNorm2d):
                fused = fuse_conv_bn_eval(getattr(module, convolution), getattr(module, norm))
                setattr(module, convolution, fused)
                setattr(module, norm, nn.Identity())
    return resnet


def hand_tuned(with_: Operands) -> Step:
    """Eager as far as one gets by hand: channels_last, bfloat16 autocast, a folded bfloat16 teacher, fused SGD."""
    folded = _folded(with_.teacher()).to(torch.bfloat16).to(memory_format=torch.channels_last)
    teacher = FeatureTap(folded, with_.taught.layer, features_only=True).eval()
    student = FeatureTap(with_.student().to(memory_format=torch.channels_last), with_.found.layer)
    paraphraser, translator = (
        network.to(memory_format=torch.channels_last) for network in (with_.paraphraser(), with_.translator())
    )
    parameters = [*student.parameters(), *translator.parameters()]
    optimiser = torch.optim.SGD(parameters, **SGD, nesterov=True, fused=True)  # type: ignore[arg-type]
    images = with_.images.contiguous(memory_format=torch.channels_last)

    def run() -> Tensor:
        with torch.autocast(with_.device.type, torch.bfloat16):
            with torch.no_grad():
                factor = _encode(paraphraser, teacher(images.bfloat16()))
            logits, features = student(images)
            loss = F.cross_entropy(logits.float(), with_.labels)
            loss = loss + BETA * official_formula(_encode(translator, features).float(), factor.float())
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        return loss.detach()

    return Step(run, student.model, optimiser)


def ours(
    with_: Operands,
    method: str,
    processes: Processes = ALONE,
    stored: Callable[[], tuple[Tensor, ...]] | None = None,
    compiled: bool | None = None,
    replayed: bool = False,
) -> Step:
    """The step of ``ftfast distill``, through its own engine; method ``"none"`` has no teacher.

    Args:
        stored: gives the factors of the next batch, which then has no teacher either.
        compiled: with torch.compile; None for what a training's many steps are: on a GPU.
        replayed: as a CUDA graph; a step that cannot be raises RuntimeError with the reason.
    """
    if compiled is None:
        compiled = with_.device.type == "cuda"
    settings = Settings(
        methods=(method,),
        teacher=with_.pair.teacher,
        student=with_.pair.student,
        teacher_channels=with_.pair.channels,
        student_channels=with_.pair.channels,
        teacher_layer=with_.taught.layer,
        student_layer=with_.found.layer,
        learning_rate=RATE,
        device=with_.device.type,
        dtype="bfloat16",
        threads=torch.get_num_threads(),
        compile="on" if compiled else "off",
    ).resolved()
    precision = precision_of(settings)
    images = with_.images.contiguous(memory_format=torch.channels_last)
    execution = "compile" if settings.compile == "on" else "eager"
    teacher = FrozenTeacher(
        with_.teacher(), with_.taught.layer, dtype=precision.dtype, example=images, execution=execution
    )
    student = registry.place(with_.student(), with_.device)
    weights = Weights(beta=BETA) if method == "ft" else Weights()
    paraphraser = registry.place(with_.paraphraser(), with_.device)
    teacher_side = TeacherSide(teacher, paraphraser)
    trainable, terms = trainable_of(settings, teacher_side, student, method=method, weights=weights, seed=with_.seed)
    if "translator" in trainable:
        trainable["translator"].load_state_dict(with_.translator().state_dict())  # the same as the others'
    schedule, frozen = schedule_of(settings, 1), (teacher, paraphraser)
    step = LearningStep(trainable, terms, schedule, precision, processes, replayed=replayed, frozen=frozen, say=_refuse)
    trainable.train()

    def run() -> Tensor:
        factors = () if stored is None else stored()
        return torch.stack(list(step((images, with_.labels, *factors), RATE).values())).sum()

    note = teacher.explain() if method != "none" and stored is None else ""
    return Step(run, student, step.optimiser, note, WARM_UPS if replayed else 0)


def _refuse(reason: str) -> None:
    raise RuntimeError(reason)


class StepJudge:
    """Holds the loss and the student's gradient of the official step, which is the float32 reference."""

    def __init__(self, with_: Operands) -> None:
        self._with = with_
        self._expected: tuple[Tensor, Tensor] | None = None
        self._tuned: dict[str, float] = {}

    def __call__(self, step: Step, *, is_float32: bool = False) -> gate.Errors:
        """No way may be further off than the hand-tuned one by more than chance; that one has wide limits.

        ``step`` must not have been taken yet.
        """
        if self._expected is None:
            self._expected = _first_step(official(self._with))
        if not self._tuned:
            self._tuned = self._errors(hand_tuned(self._with))
        if is_float32:
            return gate.within(self._errors(step), dict.fromkeys(self._tuned, 1e-2))
        limits = {name: min(1.3 * error + 1e-2, 0.5) for name, error in self._tuned.items()}
        return gate.within(self._errors(step), limits)

    def _errors(self, step: Step) -> dict[str, float]:
        assert self._expected is not None
        loss, gradient = _first_step(step)
        errors = gate.relative_errors("loss", loss, self._expected[0])
        return errors | gate.relative_errors("student's gradient", gradient, self._expected[1])


def _first_step(step: Step) -> tuple[Tensor, Tensor]:
    """Loss and the student's gradient, read before the optimiser clears it."""
    kept: list[Tensor] = []

    def read(*_: Any) -> None:
        gradients = [parameter.grad for parameter in step.student.parameters()]
        kept.append(torch.cat([gradient.float().flatten() for gradient in gradients if gradient is not None]))

    handle = step.optimiser.register_step_pre_hook(read)
    try:
        loss = step.run()
    finally:
        handle.remove()
    return loss.detach().float(), kept[0]
