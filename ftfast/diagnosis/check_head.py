"""The part of ``ftfast check`` that holds whole heads to float64: every way that a backend has to compute one."""

import copy
import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ftfast import reference
from ftfast.backends import KernelBackend, Options
from ftfast.diagnosis.check_loss import relative_error
from ftfast.extension import why_no_tiles
from ftfast.modules import Paraphraser, Translator, convolution_stack
from ftfast.ops.ft_head import function as ft_head
from ftfast.ops.ft_head.operands import Plan
from ftfast.ops.ft_head.stack import Stack

# Relative L2. In 16 bits the error is that of the maps' roundings, which the head's own conditioning magnifies: there
# each result may be off by this much more than torch's modules are in that dtype, and by one rounding.
FLOAT32_BOUND = 5e-5
ALLOWANCE = 1.5
# TF32 has float16's digits. A gradient flips with the sign of what is near 0, and of few samples a flip more counts.
TF32_ALLOWANCE = 4.0
# samples, student's channels, teacher's, the factor's, height, width
SHAPES = {"8x8": (3, 16, 32, 16, 8, 8), "7x5, odd channels": (2, 12, 20, 10, 7, 5)}
# Where the CPU has matrix tiles, which take no fewer channels.
SHAPES_ON_TILES = {"5x4, 64 channels": (3, 64, 80, 64, 5, 4)}


@dataclass(frozen=True)
class HeadOutcome:
    """The errors of one way to compute a head, relative to float64."""

    backend: str
    device: str
    kernel: str
    dtype: str
    p: int
    maps: str
    loss_error: float
    student_error: float
    parameter_error: float
    share: float  # of what is allowed, the largest of the errors
    ok: bool


def check_heads(backend: KernelBackend, device: torch.device) -> Iterator[HeadOutcome]:
    """Every way of one backend on one device; none of one that has the loss alone."""
    cases = [(torch.float32, 1), (torch.float32, 2), (torch.float16, 2)]
    if backend.place(device) != "interpreter":  # it rounds bfloat16 towards zero
        cases.append((torch.bfloat16, 2))
    has_tiles = backend.name == "native" and device.type == "cpu" and not why_no_tiles()
    shapes = SHAPES | SHAPES_ON_TILES if has_tiles else SHAPES
    for (maps, shape), (dtype, p) in itertools.product(shapes.items(), cases):
        for kernel in ways(backend, device, dtype, shape):
            yield check_head(backend, device, kernel, dtype, p, maps, shape)


def ways(backend: KernelBackend, device: torch.device, dtype: torch.dtype, shape: tuple[int, ...]) -> tuple[str, ...]:
    """The ways that a backend has to compute a head of such a shape."""
    kernels = backend.head_kernels(device)
    samples, student, teacher, factor, height, width = shape
    return kernels.candidates(device, dtype, (samples, student, height, width), factor, teacher) if kernels else ()


def check_head(
    backend: KernelBackend,
    device: torch.device,
    kernel: str,
    dtype: torch.dtype,
    p: int,
    maps: str,
    shape: tuple[int, ...],
) -> HeadOutcome:
    """Loss and gradients of one head in a given way.

    On a GPU the layers' float32 is IEEE, that of the whole head's kernels TF32.
    """
    rounds = device.type == "cuda" and dtype == torch.float32 and kernel != "layers"
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=rounds):
        return _check_head(backend, device, kernel, dtype, p, maps, shape, rounds_to_tf32=rounds)


def _check_head(
    backend: KernelBackend,
    device: torch.device,
    kernel: str,
    dtype: torch.dtype,
    p: int,
    maps: str,
    shape: tuple[int, ...],
    *,
    rounds_to_tf32: bool,
) -> HeadOutcome:
    samples, of_student, of_teacher, factor, height, width = shape
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        paraphraser = Paraphraser(of_teacher, factor_channels=factor).requires_grad_(False).to(device)
        translator = Translator(of_student, factor).to(device)
        student = torch.randn(samples, of_student, height, width).to(device, dtype).requires_grad_()
        teacher = torch.randn(samples, of_teacher, height, width).to(device, dtype)
    stacks = convolution_stack(translator), convolution_stack(paraphraser)
    assert isinstance(stacks[0], Stack)
    assert isinstance(stacks[1], Stack)
    plan = Plan(kernel, backend.name, dtype, "a check")
    loss = ft_head.run(student, teacher, None, plan, stacks[0], stacks[1], Options(p, "mean", 1e-12, 1.0))
    upstream = torch.full_like(loss, student.numel())
    found = torch.autograd.grad(loss, [student, *translator.parameters()], upstream)
    truth = _by_reference(student, teacher, paraphraser, translator, p, upstream, torch.float64)
    errors = _errors([loss, *found], truth)
    if dtype == torch.float32 and not rounds_to_tf32:
        bounds = [FLOAT32_BOUND] * len(errors)
    else:
        alike = torch.float16 if rounds_to_tf32 else dtype
        allowance = TF32_ALLOWANCE if rounds_to_tf32 else ALLOWANCE
        rounded = _by_reference(student, teacher, paraphraser, translator, p, upstream, alike)
        bounds = [allowance * (error + torch.finfo(alike).eps) for error in _errors(rounded, truth)]
    name = "tf32" if rounds_to_tf32 else str(dtype).removeprefix("torch.")
    share = max(error / bound for error, bound in zip(errors, bounds, strict=True))
    where = backend.place(device)
    names = backend.name, where, kernel, name
    return HeadOutcome(*names, p, maps, errors[0], errors[1], max(errors[2:]), share, share <= 1)


def _errors(found: list[Tensor], truth: list[Tensor]) -> list[float]:
    return [relative_error(got, exact) for got, exact in zip(found, truth, strict=True)]


def _by_reference(
    student: Tensor,
    teacher: Tensor,
    paraphraser: Paraphraser,
    translator: Translator,
    p: int,
    upstream: Tensor,
    dtype: torch.dtype,
) -> list[Tensor]:
    """Loss and gradients by torch's own modules in a dtype."""
    networks = copy.deepcopy(paraphraser).to(dtype), copy.deepcopy(translator).to(dtype)
    features = student.detach().to(dtype).requires_grad_()

    def stack(x: Tensor, network: Paraphraser | Translator) -> Tensor:
        for layer in network.encoder:
            x = F.leaky_relu(layer(x), network.negative_slope)
        return x

    factors = stack(features, networks[1]), stack(teacher.to(dtype), networks[0])
    loss = reference.ft_loss(*factors, p=p)
    gradients = torch.autograd.grad(loss, [features, *networks[1].parameters()], upstream.to(loss.dtype))
    return [loss.detach(), *gradients]


_WIDTHS = (9, 13, 13, 10, 3, 19)


def _cells(*cells: object) -> str:
    return "".join(f"{cell:<{width}}" for cell, width in zip(cells, _WIDTHS, strict=True))


def head() -> str:
    """What stands above the lines of :func:`line`."""
    return f"{_cells('backend', 'on', 'head', 'maps in', 'p', 'of')}{'loss':>9}{'d student':>11}{'d params':>11}"


def line(it: HeadOutcome) -> str:
    """One way to compute a head."""
    cells = _cells(it.backend, it.device, it.kernel, it.dtype, it.p, it.maps)
    errors = f"{it.loss_error:>9.1e}{it.student_error:>11.1e}{it.parameter_error:>11.1e}"
    return f"{cells}{errors}{'' if it.ok else '  WRONG'}"
