"""What loss and head give to a GPU: few launches, on the current stream of the factors' device, and never a wait."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

import ftfast
from ftfast.dispatch import supports
from ftfast.ops.ft_head.triton import LAYERS, SINGLE_PASS
from tests.stand_in_gpu.running import Counts, counted

pytestmark = pytest.mark.stand_in_gpu
Work = Callable[[], object]
LOSSES = ("native", "triton")
# Heads by the way that computes them, with the channels of their features, and the most launches forward and backward.
HEADS = {SINGLE_PASS: (32, 12), LAYERS: (192, 24)}


@contextmanager
def own_stream(device: int = 0) -> Iterator[None]:
    """A stream of one's own on a device, which need not be the current device."""
    stream = torch.cuda.Stream(device)
    with torch.cuda.stream(stream), torch.cuda.device(0):
        yield


def steady(work: Work, device: int = 0) -> Counts:
    """Of a later call."""
    with own_stream(device):
        for _ in range(3):
            work()
        with counted(device) as found:
            work()
    return found


def captured(work: Work, warm: int = 0) -> Counts:
    """Of a call inside a capture."""
    with own_stream():
        for _ in range(warm):
            work()
        graph = torch.cuda.CUDAGraph()
        with counted() as found, torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
            work()
    return found


def loss_work(backend: str, device: int = 0, **options: object) -> Work:
    """Forward and backward."""
    if not supports(backend, torch.device("cuda", device), torch.float32, torch.float32).ok:
        pytest.skip(f"the {backend} backend has no kernels for GPUs")
    loss = ftfast.FTLoss(backend=backend, **options)  # type: ignore[arg-type]
    student, teacher = (torch.empty(16, 8, 4, 4, device=f"cuda:{device}", dtype=torch.bfloat16) for _ in "st")
    student.requires_grad_()
    upstream = torch.empty(16 if loss.reduction == "none" else (), device=student.device)

    def work() -> tuple[Tensor, ...]:
        return torch.autograd.grad(loss(student, teacher), student, upstream)

    return work


def head_work(way: str, device: int = 0) -> Work:
    """Forward and backward under autocast, of a head that ``way`` computes."""
    channels, _ = HEADS[way]
    place = torch.device("cuda", device)
    paraphraser = ftfast.Paraphraser(channels).requires_grad_(False).to(place)
    head = ftfast.FactorTransfer(paraphraser, ftfast.Translator(channels, channels // 2).to(place))
    student, teacher = (
        torch.empty(16, channels, 4, 4, device=place, dtype=torch.bfloat16).to(memory_format=torch.channels_last)
        for _ in "st"
    )
    student.requires_grad_()
    with torch.autocast("cuda", torch.bfloat16):
        assert way in head.explain(student, teacher)
    leaves = [student, *head.translator.parameters()]
    upstream = torch.empty((), device=place)

    def work() -> tuple[Tensor, ...]:
        with torch.autocast("cuda", torch.bfloat16):
            loss = head(student, teacher)
        return torch.autograd.grad(loss, leaves, upstream)

    return work


@pytest.mark.parametrize("device", [0, 1])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("kernels", LOSSES)
def test_a_loss_is_one_launch_and_its_backward_another(kernels: str, reduction: str, device: int) -> None:
    found = steady(loss_work(kernels, device, reduction=reduction), device)
    assert found == Counts(launches=2, own=2), found


@pytest.mark.parametrize("kernels", LOSSES)
def test_a_weight_that_lies_on_the_device_is_not_waited_for(kernels: str) -> None:
    weight = torch.ones((), device="cuda")
    found = steady(loss_work(kernels, weight=weight))
    assert found == Counts(launches=2, own=2), found


@pytest.mark.parametrize("kernels", LOSSES)
def test_a_loss_is_captured_at_its_first_call(kernels: str) -> None:
    found = captured(loss_work(kernels))
    assert (found.launches, found.uncaptured, found.refused, found.captured) == (0, 0, 0, found.own), found


@pytest.mark.parametrize("device", [0, 1])
@pytest.mark.parametrize("way", HEADS)
def test_a_head_takes_few_launches_on_its_stream_and_waits_for_nothing(way: str, device: int) -> None:
    found = steady(head_work(way, device), device)
    assert found == Counts(launches=found.launches, own=found.launches), found
    _, most = HEADS[way]
    assert found.launches <= most, found


@pytest.mark.parametrize("way", HEADS)
def test_a_head_is_captured_whole(way: str) -> None:
    found = captured(head_work(way), warm=2)
    assert (found.launches, found.uncaptured, found.refused, found.captured) == (0, 0, 0, found.own), found


def test_a_head_is_not_planned_as_one_with_a_smaller_factor() -> None:
    """Its factor is too large for a single pass; the features are the same."""
    features = torch.empty(4, 64, 8, 8, device="cuda", dtype=torch.bfloat16)
    for factor, way in ((32, SINGLE_PASS), (256, LAYERS)):
        paraphraser = ftfast.Paraphraser(64, factor_channels=factor).to("cuda")
        head = ftfast.FactorTransfer(paraphraser, ftfast.Translator(64, factor).to("cuda"))
        with torch.autocast("cuda", torch.bfloat16):
            assert f"triton backend, {way}," in head.explain(features, features)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
def test_gradients_of_a_single_pass_are_kept_as_they_are_written(memory_format: torch.memory_format) -> None:
    paraphraser = ftfast.Paraphraser(32).to("cuda")
    head = ftfast.FactorTransfer(paraphraser, ftfast.Translator(32, 16).to("cuda")).to(memory_format=memory_format)
    head.hold_weights()
    features = torch.empty(4, 32, 4, 4, device="cuda").to(memory_format=torch.channels_last)

    def work() -> None:
        head.translator.zero_grad()
        head(features, features).backward()

    with torch.backends.cudnn.flags(enabled=True, allow_tf32=True):
        found = steady(work)
    assert (found.launches, found.copies) == (5, 0), found  # four, and the gradient that backward begins with
    for parameter in head.translator.parameters():
        assert parameter.grad is not None
        assert parameter.grad.stride() == parameter.stride()
