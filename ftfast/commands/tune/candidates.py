"""What there is to choose for a head on this machine, and the kernels that can compute it."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from ftfast.backends import Options
from ftfast.commands.tune.heads import HeadShape
from ftfast.modules import Paraphraser, Translator, convolution_stack
from ftfast.ops.conv3x3 import native as conv3x3_native
from ftfast.ops.ft_head import function as ft_head
from ftfast.ops.ft_head.operands import Plan
from ftfast.ops.ft_head.stack import Stack
from ftfast.ops.kernel_table import Work

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


class Candidate(NamedTuple):
    """One kernel for a piece of work; ``run`` gives the results that all candidates have to agree on."""

    kernel: str
    run: Callable[[], Sequence[Tensor]]


def jobs(
    head: HeadShape, dtype: torch.dtype, device: torch.device
) -> Iterator[tuple[Work, Callable[[], list[Candidate]]]]:
    """What there is to choose for a head: on the CPU its weight gradients' kernels, on a GPU the way to compute it."""
    name = str(dtype).removeprefix("torch.")
    place = head.samples, head.height, head.width
    if device.type != "cpu":
        yield Work("head", name, *place, head.student, head.factor), partial(_heads, head, dtype, device)
    elif dtype != torch.float16:
        for channels, outputs in dict.fromkeys(head.layers("student") + head.layers("teacher")):
            work = Work("weight_gradient", name, *place, channels, outputs)
            yield work, partial(_weight_gradients, work, dtype)


def _weight_gradients(work: Work, dtype: torch.dtype) -> list[Candidate]:
    generator = torch.Generator().manual_seed(0)
    x, dz = (
        torch.randn(work.samples, channels, work.height, work.width, generator=generator)
        .to(dtype)
        .contiguous(memory_format=torch.channels_last)
        for channels in (work.channels_in, work.channels_out)
    )
    parameter = torch.randn(work.channels_out, work.channels_in, 3, 3, generator=generator)

    def compute(kernel: str) -> list[Tensor]:
        _, found = conv3x3_native.gradients(x, dz, parameter, need_input=False, kernel=kernel)
        assert found is not None
        return [found]

    kernels = conv3x3_native.candidates(work.channels_in, work.channels_out)
    return [Candidate(kernel, partial(compute, kernel)) for kernel in kernels]


def _heads(head: HeadShape, dtype: torch.dtype, device: torch.device) -> list[Candidate]:
    """A step of the head, forward and backward, by each way that can compute it."""
    from ftfast.ops.ft_head import triton as ft_head_triton

    torch.manual_seed(0)
    paraphraser = Paraphraser(head.teacher, factor_channels=head.factor).to(device).requires_grad_(False)
    translator = Translator(head.student, head.factor).to(device)
    of_student, of_teacher = convolution_stack(translator), convolution_stack(paraphraser)
    assert isinstance(of_student, Stack)
    assert isinstance(of_teacher, Stack)
    student, teacher = (
        torch.randn(head.samples, channels, head.height, head.width, device=device, dtype=dtype)
        .contiguous(memory_format=torch.channels_last)
        .requires_grad_(side == "student")
        for side, channels in (("student", head.student), ("teacher", head.teacher))
    )
    options = Options(1, "mean", 1e-12, 1.0)

    def step(kernel: str) -> Sequence[Tensor]:
        plan = Plan(kernel, "triton", dtype, "tuning")
        # Held, as training holds the paraphraser: its weights are prepared once.
        loss = ft_head.run(
            student, teacher, None, plan, of_student, of_teacher, options, held=0
        )  # prepared once, as in training
        return torch.autograd.grad(loss, [student, *translator.parameters()])

    shape = (head.samples, head.student, head.height, head.width)
    ways = ft_head_triton.candidates(device, dtype, shape, head.factor, head.teacher)
    return [Candidate(kernel, partial(step, kernel)) for kernel in ways]
