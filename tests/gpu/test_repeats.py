"""Every kernel that passes numbers through memory or counters inside a launch gives the same bits every time.

A missing barrier, a stale cache line or a counter that is not set back shows as a result that changes between runs on
the same inputs. Every second run has a neighbour: matrix products on another stream, which shift the programs in time.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import ftfast
from bench.kernels import heads
from ftfast.commands.tune.heads import HEADS
from ftfast.ops.ft_head.triton import LAYERS, SINGLE_PASS

Results = Callable[[], list[Tensor]]
RUNS = 1000
MEASURED = ("cifar-r56-r20", "cifar-wrn40x2-wrn16x2", "imagenet-r34-r18")
DTYPES = (torch.bfloat16, torch.float32)
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits(tensor: Tensor) -> Tensor:
    """The tensor as integers, so that NaN equals itself and -0 is not 0."""
    return tensor.detach().contiguous().view(BITS[tensor.dtype.itemsize])


def differing(results: Results, runs: int, device: torch.device) -> int:
    """How many of ``runs`` differ from the first in any bit."""
    first = [bits(tensor).clone() for tensor in results()]
    found = torch.zeros((), dtype=torch.int64, device=device)
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
        found += ~same
    return int(found.item())


def test_a_run_that_differs_in_one_bit_is_counted() -> None:
    device = torch.device("cpu")
    same = torch.tensor([1.0, float("nan"), -0.0])
    assert differing(lambda: [same.clone()], 5, device) == 0
    runs: list[int] = []

    def changing() -> list[torch.Tensor]:
        runs.append(1)
        found = same.clone()
        # The fourth run after the first has the other zero.
        found[2] = 0.0 if len(runs) == 5 else -0.0
        return [same.to(torch.bfloat16), found]

    assert differing(changing, 6, device) == 1


@pytest.mark.cuda
@pytest.mark.parametrize(("p", "reduction"), [(1, "mean"), (2, "mean"), (1, "none")])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", MEASURED)
def test_a_loss_is_the_same_in_a_thousand_runs(
    name: str, dtype: torch.dtype, p: int, reduction: str, backend: str, device: str
) -> None:
    head = HEADS[name]
    shape = (head.samples, head.factor, head.height, head.width)
    factors = [torch.randn(shape, device=device).to(dtype).requires_grad_() for _ in "st"]

    def run() -> list[Tensor]:
        loss = ftfast.ft_loss(*factors, p=p, reduction=reduction, backend=backend)
        return [loss, *torch.autograd.grad(loss, factors, torch.ones_like(loss))]

    assert differing(run, RUNS, torch.device(device)) == 0


@pytest.mark.cuda
@pytest.mark.parametrize("way", [SINGLE_PASS, LAYERS])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", MEASURED)
def test_a_head_is_the_same_in_a_thousand_runs(
    name: str, dtype: torch.dtype, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = torch.device("cuda", 0)
    # IEEE float32 is the library's, whose kernels between ours may not be what differs.
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    with_ = heads.operands(HEADS[name], dtype, device, 0)
    ways = heads.ways(with_)
    if way not in ways:
        pytest.skip("it has only the other way")

    def run() -> list[Tensor]:
        loss = ways[way](with_.student, with_.teacher)
        return [loss, *torch.autograd.grad(loss, list(with_.leaves().values()))]

    assert differing(run, RUNS, device) == 0
