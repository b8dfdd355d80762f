"""What the compiler makes of the layered head's kernels and of the packing, from the machine code; no GPU is needed."""

import os
import re

import pytest
import torch
from torch import Tensor

if os.environ.get("TRITON_INTERPRET", "0") == "1":
    pytest.skip("with TRITON_INTERPRET=1 kernels are interpreted, not compiled", allow_module_level=True)
pytest.importorskip("triton", reason="the package triton is not installed")

from bench.machine_code import shipped
from bench.machine_code.compiling import ARCHITECTURES, Launch, Machine, cache_key, compile_launch, recorded
from bench.machine_code.shipped import ShippedLaunch
from bench.machine_code.shipped.ft_head_layers import run_launchers
from bench.machine_code.shipped.pack_weights import pack_for_head
from ftfast.commands.tune.heads import HeadShape
from ftfast.kernels import activation
from ftfast.kernels.ft_head import copy_weights, ft_head_loss, pack_weights

QUICK = {
    "scaled direction 64 of 128x128->64x8x8 bfloat16",
    "both directions bfloat16",
}
SHIPPED = [
    pytest.param(found, architecture, id=f"{found.name}, sm_{architecture}", marks=marks)
    for feature in ("ft_head_layers", "pack_weights")
    for found in shipped.discover()[feature]()
    for architecture in found.architectures
    for marks in [[] if found.name in QUICK and architecture == 90 else [pytest.mark.slow]]
]


def assert_fits(launched: Launch, architecture: int) -> Machine:
    machine = compile_launch(launched, architecture)
    assert not machine.problems(), launched
    return machine


@pytest.mark.parametrize(("found", "architecture"), SHIPPED)
def test_shipped_launches(found: ShippedLaunch, architecture: int) -> None:
    assert_fits(found.launch, architecture)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_gradient_at_the_end_for_p_2(dtype: torch.dtype, architecture: int) -> None:
    with recorded(activation), recorded(copy_weights), recorded(ft_head_loss) as launches:
        run_launchers(HeadShape("", 2, 16, 16, 256, 7, 7), dtype, p=2)
    for launched in launches:
        assert_fits(launched, architecture)


def test_new_shapes_keep_their_kernels() -> None:
    keys = set()
    for samples, height, width in [(2, 7, 7), (3, 5, 8), (5, 2, 6), (16, 16, 5)]:
        with recorded(activation) as launches:
            run = torch.empty(samples, height, width, 64, dtype=torch.bfloat16)
            activation.bias_leaky_relu_(run, torch.empty(64), 0.1)
            activation.sum_partials([activation.leaky_relu_backward_(run, run, 0.1)])
        keys |= {cache_key(launched) for launched in launches}
    assert len(keys) == 3


def wide_share(machine: Machine) -> float:
    """The part of the loads and stores of global memory that move 16 bytes."""
    moves = re.findall(r"\b(?:LDG|STG)\.E\S*", machine.sass)
    return sum(".128" in move for move in moves) / len(moves)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("channels", [32, 512])
def test_activation_moves_16_bytes_at_once(channels: int, dtype: torch.dtype, architecture: int) -> None:
    z, output = (torch.empty((4, 7, 7, channels), dtype=dtype) for _ in range(2))
    with recorded(activation) as launches:
        activation.bias_leaky_relu_(z, torch.empty(channels), 0.1)
        activation.leaky_relu_backward_(z, output, 0.1)
        activation.sum_partials([torch.empty(5, channels)])
    # The bias comes on top.
    assert all(wide_share(assert_fits(launched, architecture)) >= 0.6 for launched in launches)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("p", [1, 2])
def test_the_gradient_at_the_end_moves_16_bytes_at_once(p: int, architecture: int) -> None:
    factor = torch.empty(4, 7, 7, 256, dtype=torch.bfloat16)
    with recorded(ft_head_loss) as launches:
        ft_head_loss.scaled_direction(
            factor, factor, torch.empty(5, 4), torch.empty(()), p=p, reduction="mean", weight=1.0, negative_slope=0.1
        )
    machine = assert_fits(launches[0], architecture)
    # Both factors are read and the result is written so; statistics of a row, and sums of a column, are numbers.
    block = launches[0].arguments["ROWS"] * launches[0].arguments["COLUMNS"] * factor.element_size()
    pieces = block // (16 * 32 * machine.warps)
    assert machine.count(r"LDG\.E\S*\.128") >= 2 * pieces
    assert machine.count(r"STG\.E\S*\.128") >= pieces
    # A contracted x * r - y * r is not 0 for equal factors.
    assert "fma.rn" not in machine.ptx


@pytest.mark.parametrize("backward", [False, True])
def test_packing_of_three_weights_is_one_launch(backward: bool) -> None:
    def weights(*sizes: int) -> list[Tensor]:
        return [torch.empty(size, 2 * size, 3, 3) for size in sizes]

    with recorded(pack_weights) as launches:
        for given in (weights(32, 64, 24), weights(512, 3)):
            pack_for_head(given, torch.bfloat16, backward=backward)
    assert len(launches) == 2
    assert cache_key(launches[0]) == cache_key(launches[1])
