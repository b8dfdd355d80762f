"""The whole head as autograd sees it: one autograd.Function over a backend's kernels."""

from typing import Any

import torch
from torch import Tensor

from ftfast.backends import KernelBackend, Options
from ftfast.dispatch import BACKENDS
from ftfast.ops.ft_head.operands import Head, Kept, Plan
from ftfast.ops.ft_head.stack import Stack
from ftfast.ops.ft_loss.function import separate_weight
from ftfast.ops.maps import no_autocast
from ftfast.ops.memory import all_lie_in_memory, is_batched, plain, save, saved
from ftfast.reference import scalar


def run(
    student: Tensor,
    teacher: Tensor | None,
    teacher_factor: Tensor | None,
    plan: Plan,
    translator: Stack,
    paraphraser: Stack | None,
    options: Options,
    held: int | None = None,
) -> Tensor:
    """The loss of a head that ``plan`` gives to our kernels.

    Args:
        held: how often it was said that the paraphraser's tensors are written to through torch alone; None where it
            was not.
    """
    weight, multiplier = separate_weight(options.weight)
    student = plain(student)
    teacher = None if teacher is None else plain(teacher)
    teacher_factor = None if teacher_factor is None else plain(teacher_factor)
    if weight is not options.weight:
        options = options._replace(weight=weight)
    head = Head(plan, _plain(translator), None if paraphraser is None else _plain(paraphraser), options, held)
    parameters = translator.parameters()
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (student, *parameters)):
        loss = FTHeadFunction.apply(student, teacher, teacher_factor, head, *parameters)
    else:
        with no_autocast(student.device.type):
            loss, _ = _kernels(plan, student.device).ft_head_forward(student, teacher, teacher_factor, head, keep=False)
    return loss if multiplier is None else loss * scalar(multiplier, loss.dtype)


def _plain(stack: Stack) -> Stack:
    if all_lie_in_memory((*stack.weights, *stack.biases)):
        return stack
    return stack._replace(weights=tuple(map(plain, stack.weights)), biases=tuple(map(plain, stack.biases)))


def _kernels(plan: Plan, device: torch.device) -> Any:
    backend = BACKENDS[plan.backend]
    assert isinstance(backend, KernelBackend)
    return backend.head_kernels(device)


class FTHeadFunction(torch.autograd.Function):
    """Over the student's features and the translator's parameters; the paraphraser has no graph.

    Keeps the inputs of the translator's convolutions, the gradient at their end, and the weights as packed.
    """

    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        teacher: Tensor | None,
        teacher_factor: Tensor | None,
        head: Head,
        *parameters: Tensor,
    ) -> Tensor:
        with no_autocast(student.device.type):
            kernels = _kernels(head.plan, student.device)
            loss, kept = kernels.ft_head_forward(student, teacher, teacher_factor, head, keep=True)
        weight = head.options.weight
        save(ctx, weight if isinstance(weight, Tensor) else None, *kept.tensors)
        ctx.head, ctx.plan = head, kept.plan
        ctx.student_dtype = student.dtype
        return loss

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled() or is_batched(upstream):
            raise RuntimeError(
                "a second or batched derivative of the fused head is not kept; build the head with "
                'backend="reference" for it.'
            )
        needed, upstream = (ctx.needs_input_grad[0], *ctx.needs_input_grad[4:]), plain(upstream)
        weight, *tensors = saved(ctx)
        head = ctx.head if weight is None else ctx.head._replace(options=ctx.head.options._replace(weight=weight))
        with no_autocast(upstream.device.type):
            kernels = _kernels(head.plan, upstream.device)
            gradients = kernels.ft_head_backward(Kept(tensors, ctx.plan), upstream, head, needed)
        if gradients[0] is not None and gradients[0].dtype != ctx.student_dtype:
            gradients[0] = gradients[0].to(ctx.student_dtype)
        return gradients[0], None, None, None, *gradients[1:]
