"""The stand-in GPU counts what a GPU would wait for, and refuses what it would refuse."""

from collections.abc import Callable
from contextlib import suppress

import pytest
import torch

from tests.stand_in_gpu.libraries import launch
from tests.stand_in_gpu.running import Counts, contents, counted

pytestmark = pytest.mark.stand_in_gpu


def test_launches_and_copies_are_told_apart() -> None:
    x = torch.empty(4, device="cuda")
    x[0].item()  # which keeps a place on the host for what comes back
    with counted() as found:
        x.add_(1)
        x.copy_(torch.empty(4))
        x[0].item()
    assert found == Counts(launches=1, copies=2, legacy=3, pageable=1, synchronisations=2), found


def test_numbers_arrive_on_the_device_and_none_come_back() -> None:
    expected = torch.arange(1000).pin_memory()
    x = expected.to("cuda", non_blocking=True)
    assert contents(x) == expected.numpy().tobytes()
    assert not x.cpu().any()
    assert x.isfinite().all()


def wait(x: torch.Tensor, aside: torch.cuda.Stream) -> None:
    x[0].item()


def leave_a_stream_behind(x: torch.Tensor, aside: torch.cuda.Stream) -> None:
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        x.add_(1)


def wait_for_what_came_before(x: torch.Tensor, aside: torch.cuda.Stream) -> None:
    torch.cuda.current_stream().wait_stream(aside)


@pytest.mark.parametrize("work", [wait, leave_a_stream_behind, wait_for_what_came_before])
def test_a_capture_refuses(work: Callable[[torch.Tensor, torch.cuda.Stream], None]) -> None:
    x, aside, graph = torch.empty(4, device="cuda"), torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with counted() as found, suppress(RuntimeError), torch.cuda.graph(graph):
        work(x, aside)
    assert found.refused


def test_a_stream_that_comes_back_is_captured() -> None:
    x, aside, graph = torch.empty(4, device="cuda"), torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with counted() as found, torch.cuda.graph(graph):
        leave_a_stream_behind(x, aside)
        torch.cuda.current_stream().wait_stream(aside)
    with counted() as replayed:
        graph.replay()
    assert (found.captured, found.uncaptured, found.refused, replayed.replays) == (1, 0, 0, 1)


def test_what_a_capture_does_not_see_is_told() -> None:
    x, aside, graph = torch.empty(4, device="cuda"), torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with counted() as found, torch.cuda.graph(graph), torch.cuda.stream(aside):
        x.add_(1)
    assert (found.captured, found.uncaptured) == (0, 1)


def test_a_stream_of_another_device_is_refused() -> None:
    aside = torch.cuda.Stream(1)
    with counted() as found, torch.cuda.device(0), pytest.raises(RuntimeError, match="refuses"):
        launch(0, aside.cuda_stream)
    assert found.refused == 1
