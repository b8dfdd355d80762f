"""Bit-equal repeats of every kernel that passes numbers through memory or counters inside a launch.

A missing barrier, a stale cache line or a counter that is not set back shows as a result that changes between runs on
the same inputs. Every second run has a neighbour: matrix products on another stream, which shift the programs in time.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import ftfast
from bench.on_gpu.findings import Findings, device_here, try_each
from bench.shapes import HEADS, HeadShape, parse_head
from ftfast.backends import Options
from ftfast.modules import convolution_stack
from ftfast.ops.ft_head import function as ft_head
from ftfast.ops.ft_head.operands import Plan
from ftfast.ops.ft_head.stack import Stack

Results = Callable[[], list[Tensor]]

MEASURED = ("cifar-r56-r20", "cifar-wrn40x2-wrn16x2", "imagenet-r34-r18")
WAYS = ("single pass", "layers")
DTYPES = (torch.bfloat16, torch.float32)
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits(tensor: Tensor) -> Tensor:
    """The tensor as integers, so that NaN equals itself and -0 is not 0."""
    return tensor.detach().contiguous().view(BITS[tensor.dtype.itemsize])


def count_differing(results: Results, runs: int, device: torch.device) -> dict[str, Any]:
    """Run ``results`` again and again, and count the runs that differ from the first in any bit."""
    first = [bits(tensor).clone() for tensor in results()]
    differing = torch.zeros((), dtype=torch.int64, device=device)
    elements = sum(tensor.numel() for tensor in first)
    on_gpu = device.type == "cuda"
    stream = torch.cuda.Stream() if on_gpu else None
    busy = torch.randn(2048, 2048, device=device, dtype=torch.bfloat16) if on_gpu else None
    for run in range(runs):
        if stream is not None and busy is not None and run % 2:
            with torch.cuda.stream(stream):
                busy @ busy
        same = torch.ones((), dtype=torch.bool, device=device)
        for tensor, expected in zip(results(), first, strict=True):
            same &= (bits(tensor) == expected).all()
        differing += ~same
    found = int(differing.item())
    report = {"device": device.type, "runs": runs, "elements": elements, "differing": found}
    if found:
        report["error"] = f"{found} of {runs} runs differ from the first"
    return report


def loss_results(shape: tuple[int, ...], dtype: torch.dtype, p: int, reduction: str, device: torch.device) -> Results:
    """The loss and both factors' gradients."""
    from ftfast.kernels import ft_loss

    student, teacher = (torch.randn(shape, device=device).to(dtype) for _ in range(2))

    def run() -> list[Tensor]:
        loss, statistics = ft_loss.ft_loss_forward(student, teacher, p=p, reduction=reduction, eps=1e-12, weight=1.0)
        gradients = ft_loss.ft_loss_backward(
            student,
            teacher,
            statistics,
            torch.ones_like(loss),
            p=p,
            reduction=reduction,
            weight=1.0,
            student_gradient=True,
            teacher_gradient=True,
        )
        return [loss, *(gradient for gradient in gradients if gradient is not None)]

    return run


def head_results(shape: HeadShape, dtype: torch.dtype, way: str, device: torch.device) -> Results:
    """The loss and every gradient of a head, computed in one way."""
    paraphraser = ftfast.Paraphraser(shape.teacher, factor_channels=shape.factor).to(device).requires_grad_(False)
    translator = ftfast.Translator(shape.student, shape.factor).to(device)
    student, teacher = (
        torch.randn(shape.samples, channels, shape.height, shape.width, device=device)
        .relu()
        .to(dtype)
        .contiguous(memory_format=torch.channels_last)
        for channels in (shape.student, shape.teacher)
    )
    student.requires_grad_()
    stacks = [convolution_stack(network) for network in (translator, paraphraser)]
    of_student, of_teacher = (stack for stack in stacks if isinstance(stack, Stack))
    plan = Plan(way, "triton", dtype, "asked for")
    options = Options(1, "mean", 1e-12, 1.0)
    leaves = [student, *translator.parameters()]

    def run() -> list[Tensor]:
        loss = ft_head.run(student, teacher, None, plan, of_student, of_teacher, options)
        return [loss, *torch.autograd.grad(loss, leaves)]

    return run


def cases(
    heads: list[HeadShape], dtypes: tuple[torch.dtype, ...], runs: int
) -> dict[str, Callable[[], dict[str, Any]]]:
    """One for each kernel, shape and dtype."""
    device = device_here()
    found: dict[str, Callable[[], dict[str, Any]]] = {}

    def add(name: str, build: Callable[[], Results]) -> None:
        def case() -> dict[str, Any]:
            torch.manual_seed(0)
            report = count_differing(build(), runs, device)
            if "error" in report:
                raise RuntimeError(report["error"])
            return report

        found[name] = case

    for dtype in dtypes:
        ending = str(dtype).removeprefix("torch.")
        for head in heads:
            factor = (head.samples, head.factor, head.height, head.width)
            for p, reduction in ((1, "mean"), (2, "mean"), (1, "none")):
                add(
                    f"ft_loss {'x'.join(map(str, factor))} p={p} {reduction}, {ending}",
                    lambda factor=factor, dtype=dtype, p=p, reduction=reduction: loss_results(  # type: ignore[misc]
                        factor, dtype, p, reduction, device
                    ),
                )
            for way in WAYS:
                add(
                    f"ft_head {way} {head}, {ending}",
                    lambda head=head, dtype=dtype, way=way: head_results(head, dtype, way, device),  # type: ignore[misc]
                )
    return found


def main() -> int:
    """Returns how many cases raised or differed, at most 100."""
    parser = argparse.ArgumentParser(prog="python -m bench.on_gpu.repeats", description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--small", action="store_true", help="two runs of each kernel on a tiny head")
    options = parser.parse_args()
    # IEEE float32 is the library's; the kernels are what is repeated.
    torch.backends.cudnn.allow_tf32 = True
    # Where a way has the library's kernels among ours, these may not be what differs.
    torch.backends.cudnn.deterministic = True
    if options.small:
        repeated = cases([parse_head("2x8:4x2x2")], (torch.float32,), 2)
    else:
        repeated = cases([HEADS[name] for name in MEASURED], DTYPES, options.runs)
    return min(try_each(Findings(options.out), repeated), 100)


if __name__ == "__main__":
    sys.exit(main())
