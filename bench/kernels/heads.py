"""A head, the ways to compute it, and what judges them against float64; bench/kernels/ft_head.py times them."""

import contextlib
import copy
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import ftfast
from bench import peers
from bench.harness import gate
from bench.peers import Loss
from ftfast import reference
from ftfast.backends import Options
from ftfast.commands.tune.heads import HeadShape
from ftfast.modules import convolution_stack
from ftfast.ops.ft_head import function as ft_head
from ftfast.ops.ft_head.operands import Plan
from ftfast.ops.ft_head.stack import Stack


class Operands(NamedTuple):
    """A head and its features; the student's require a gradient."""

    head: ftfast.FactorTransfer
    student: Tensor
    teacher: Tensor
    dtype: torch.dtype

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """What training runs under; nothing where the dtype is that of the parameters."""
        if self.dtype.itemsize >= 4:
            return contextlib.nullcontext()
        return torch.autocast(self.student.device.type, self.dtype)

    def leaves(self) -> dict[str, Tensor]:
        """What gets a gradient, by name."""
        return {"student features": self.student, **dict(self.head.translator.named_parameters())}


def operands(shape: HeadShape, dtype: torch.dtype, device: torch.device, seed: int) -> Operands:
    """A head as its makers initialise it, and features as a ReLU leaves them; everything channels_last."""
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        paraphraser = ftfast.Paraphraser(shape.teacher, factor_channels=shape.factor)
        translator = ftfast.Translator(shape.student, shape.factor)
    head = ftfast.FactorTransfer(paraphraser, translator).to(device, torch.promote_types(dtype, torch.float32))
    head = head.to(memory_format=torch.channels_last)
    student, teacher = (
        torch.randn(shape.samples, channels, shape.height, shape.width, generator=generator)
        .relu()
        .to(device, dtype)
        .contiguous(memory_format=torch.channels_last)
        for channels in (shape.student, shape.teacher)
    )
    return Operands(head, student.requires_grad_(), teacher, dtype)


def _stack(x: Tensor, network: Any) -> Tensor:
    for layer in network.encoder:
        x = F.leaky_relu(F.conv2d(x, layer.weight, layer.bias, stride=1, padding=1), network.negative_slope)
    return x


def eager_head(with_: Operands, loss: Loss = peers.official_formula) -> Loss:
    """The official code's way: torch's layers and its formula, under autocast."""
    head = with_.head

    def run(student: Tensor, teacher: Tensor) -> Tensor:
        with with_.autocast():
            with torch.no_grad():
                teacher_factor = _stack(teacher, head.paraphraser)
            return loss(_stack(student, head.translator), teacher_factor)

    return run


def compiled_head(with_: Operands, mode: str = "default") -> Loss:
    """torch.compile of :func:`eager_head`."""
    torch.compiler.reset()
    return torch.compile(eager_head(with_), dynamic=False, mode=mode)


def our_head(with_: Operands) -> Loss:
    """The public head, under autocast."""

    def run(student: Tensor, teacher: Tensor) -> Tensor:
        with with_.autocast():
            return with_.head(student, teacher)

    return run


def ways(with_: Operands) -> dict[str, Loss]:
    """The ways that can compute the head on a GPU, by name."""
    from ftfast.ops.ft_head import triton as ft_head_triton

    head, student, teacher = with_.head, with_.student, with_.teacher
    factor_channels = head.paraphraser.factor_channels
    shape = tuple(student.shape)
    names = ft_head_triton.candidates(student.device, with_.dtype, shape, factor_channels, teacher.shape[1])
    return {name: one_way(head, with_.dtype, name) for name in names}


def one_way(head: ftfast.FactorTransfer, dtype: torch.dtype, way: str) -> Loss:
    """A head computed in the way of this name, in a dtype."""
    stacks = [convolution_stack(network) for network in (head.translator, head.paraphraser)]
    of_student, of_teacher = (stack for stack in stacks if isinstance(stack, Stack))
    plan, options = Plan(way, "triton", dtype, "asked for"), Options(1, "mean", 1e-12, 1.0)
    return lambda student, teacher: ft_head.run(student, teacher, None, plan, of_student, of_teacher, options)


def results(loss: Loss, with_: Operands, upstream: float) -> dict[str, Tensor]:
    """The loss and every gradient under ``upstream``, by name."""
    leaves = with_.leaves()
    value = loss(with_.student, with_.teacher)
    gradient = torch.tensor(upstream, dtype=value.dtype, device=value.device)
    gradients = torch.autograd.grad(value, list(leaves.values()), gradient)
    return {"loss": value, **{f"gradient of {name}": found for name, found in zip(leaves, gradients, strict=True)}}


class HeadJudge:
    """Holds the float64 results of a head, and how far the eager peer is from them."""

    def __init__(self, with_: Operands, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self._with = with_
        self._size = _factor_size(with_)
        # Of the size N*D, as a loss weight and an AMP scale make it; a mean's gradients are below float16's range.
        self._upstream = self._size * (0.5 + torch.rand((), generator=generator).item())
        self._undecided = 0
        self._expected: dict[str, Tensor] = {}
        self._eager_errors: dict[str, float] = {}

    def expected(self) -> dict[str, Tensor]:
        """In float64, of the features and parameters as the candidates get them."""
        if not self._expected:
            head, student, teacher, _ = self._with
            exact = Operands(
                copy.deepcopy(head).double(),
                student.detach().double().requires_grad_(),
                teacher.double(),
                torch.float64,
            )

            def loss(student_factor: Tensor, teacher_factor: Tensor) -> Tensor:
                self._undecided = _undecided(student_factor.detach(), teacher_factor)
                return reference.ft_loss(student_factor, teacher_factor)

            self._expected = results(eager_head(exact, loss), exact, self._upstream)
        return self._expected

    def errors(self, loss: Loss) -> dict[str, float]:
        """The relative errors of a candidate's results."""
        expected = self.expected()
        errors: dict[str, float] = {}
        for name, found in results(loss, self._with, self._upstream).items():
            errors |= gate.relative_errors(name, found, expected[name])
        return errors

    def eager_errors(self) -> dict[str, float]:
        """The official formula's, rounded as it rounds."""
        if not self._eager_errors:
            self._eager_errors = self.errors(eager_head(self._with))
        return self._eager_errors

    def __call__(self, loss: Loss, *, is_eager: bool = False) -> gate.Errors:
        """No candidate may be further off than the eager peer by more than chance; that one has wide limits."""
        dtype = self._with.dtype
        eager = self.eager_errors()
        if is_eager:
            return gate.within(eager, dict.fromkeys(eager, EAGER_LIMITS[dtype]))
        rounds = dtype.itemsize < 4 or (dtype == torch.float32 and _uses_tf32(self._with.student.device))
        chance = SLACK[dtype] + (0.25 / self._size**0.5 if rounds else 0.0)
        limits = {name: 1.5 * error + chance for name, error in eager.items()}
        for name, error in eager.items():
            length = gate.length_of(name)
            if length in limits:
                # A sign of a - b that rounding turns moves the gradient, and its length by a part of that.
                limits[length] += 0.15 * error
                # A bias's gradient is a sum of such signs: with few samples its length is off by chance, in eager too.
                limits[length] += 1 / self._size**0.5 if rounds and name.endswith("bias") else 0.0
                limits[name] += 2 * (self._undecided / self._size) ** 0.5
        return gate.within(self.errors(loss), limits)


# What is left to chance beside eager's own errors, and the most that those may be.
SLACK = {torch.float64: 1e-12, torch.float32: 3e-5, torch.bfloat16: 1e-3, torch.float16: 1e-3}
EAGER_LIMITS = {torch.float64: 1e-9, torch.float32: 1e-1, torch.bfloat16: 5e-1, torch.float16: 5e-1}


def _undecided(student_factor: Tensor, teacher_factor: Tensor) -> int:
    """How many signs of ``a - b`` float32 cannot tell."""
    a, b = (F.normalize(factor.flatten(1)) for factor in (student_factor, teacher_factor))
    return int(((a - b).abs() <= 8 * torch.finfo(torch.float32).eps * (a.abs() + b.abs())).sum().item())


def _uses_tf32(device: torch.device) -> bool:
    return device.type == "cuda" and torch.backends.cudnn.allow_tf32


def _factor_size(with_: Operands) -> int:
    samples, _, height, width = with_.student.shape
    return samples * with_.head.paraphraser.factor_channels * height * width


def saved_bytes(loss: Loss, with_: Operands) -> int:
    """What a forward keeps for its backward: the storages that autograd saves, each once, without parameters."""
    kept: dict[int, torch.UntypedStorage] = {}
    parameters = {parameter.untyped_storage().data_ptr() for parameter in with_.head.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        value = loss(with_.student, with_.teacher)
    total = sum(storage.nbytes() for storage in kept.values())
    del value
    return total
