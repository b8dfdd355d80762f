"""A gradient that is taken through torch's operators, to be differentiated again or for several upstream gradients."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import ftfast
from ftfast.ops.attention.difference import attention_difference

SHAPE = (8, 4, 5, 5)


def _factors(student: Tensor) -> Tensor:
    return ftfast.ft_loss(student, torch.linspace(-1, 1, student.numel()).view_as(student))


def _maps(student: Tensor) -> Tensor:
    return attention_difference(student, torch.linspace(-1, 2, student.numel()).view_as(student), p=2)


def _layer(student: Tensor) -> Tensor:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return ftfast.Translator(4, 4)(student).square().mean()


WAYS = {"ft_loss": _factors, "attention": _maps, "translator": _layer}
Way = Callable[[Tensor], Tensor]


@pytest.fixture(params=list(WAYS))
def way(request: pytest.FixtureRequest) -> Way:
    return WAYS[request.param]


def leaf() -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(1)).requires_grad_()


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph")
def test_a_hook_on_the_input_runs_once_under_create_graph(way: Way) -> None:
    """It ran inside the backward of ours too, and so did retain_grad's."""
    x = leaf()
    (expected,) = torch.autograd.grad(way(x), x)
    x.register_hook(lambda gradient: gradient * 2)
    (doubled,) = torch.autograd.grad(way(x), x, create_graph=True)
    torch.testing.assert_close(doubled, 2 * expected, rtol=1e-4, atol=1e-9)
    inner = leaf()
    between = inner * 1
    between.retain_grad()
    way(between).backward(create_graph=True)
    torch.testing.assert_close(between.grad, expected, rtol=1e-4, atol=1e-9)
    inner.grad = between.grad = None  # which hold the graph


def test_several_upstream_gradients_leave_no_graph(way: Way) -> None:
    x = leaf()
    found = torch.autograd.grad(way(x), x, torch.tensor([1.0, 2.0]), is_grads_batched=True)[0]
    assert not found.requires_grad
    torch.testing.assert_close(found[1], 2 * found[0], rtol=1e-4, atol=1e-9)


def test_the_second_derivative_passes_through(way: Way) -> None:
    x = leaf()
    (gradient,) = torch.autograd.grad(way(x), x, create_graph=True)
    gradient.square().sum().backward()
    assert x.grad is not None
    assert x.grad.abs().max() > 0


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph")
def test_an_input_that_was_frozen_meanwhile(way: Way) -> None:
    x = leaf()
    loss = way(x)
    x.requires_grad_(False)
    loss.backward(create_graph=True)
    assert isinstance(x, Tensor)
    assert not isinstance(x, nn.Parameter)
