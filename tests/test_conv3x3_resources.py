"""What the compiler makes of the 3x3 convolution's kernels, read from the machine code; no GPU is needed."""

import os
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

if os.environ.get("TRITON_INTERPRET", "0") == "1":
    pytest.skip("with TRITON_INTERPRET=1 kernels are interpreted, not compiled", allow_module_level=True)
pytest.importorskip("triton", reason="the package triton is not installed")
activation = pytest.importorskip("ftfast.kernels.activation")
conv3x3 = pytest.importorskip("ftfast.kernels.conv3x3")
conv3x3_tiles = pytest.importorskip("ftfast.kernels.conv3x3_tiles")
conv3x3_weight_gradient = pytest.importorskip("ftfast.kernels.conv3x3_weight_gradient")
packing = pytest.importorskip("ftfast.kernels.pack_weights")

from bench.machine_code.compiling import ARCHITECTURES, Launch, Machine, cache_key, compile_launch, recorded  # noqa: E402

MODULES = (activation, conv3x3, conv3x3_weight_gradient, packing)
# Heads by what their paper's tables name: samples, channels, height and width.
HEADS = [(128, 64, 8), (128, 128, 8), (128, 256, 8), (256, 512, 7), (64, 1024, 14), (256, 2048, 7)]
LAYERS = [
    (samples, size, inputs, outputs)
    for samples, channels, size in HEADS
    for inputs, outputs in (
        (channels, channels),
        (channels, channels // 2),
        (channels // 2, channels // 2),
    )
]
# The products of 16 bits and of float32 in one and in three TF32 pieces.
PRODUCTS = [(torch.bfloat16, "tf32"), (torch.float32, "tf32"), (torch.float32, "tf32x3")]


@contextmanager
def recording() -> Iterator[list[Launch]]:
    """Collects what any of the launchers would launch, and launches nothing."""
    with ExitStack() as stack:
        launches: list[Launch] = []
        by_module = [stack.enter_context(recorded(module)) for module in MODULES]
        yield launches
        for found in by_module:
            launches += found


@pytest.fixture(params=ARCHITECTURES)
def architecture(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """The launchers take the tiles of this compute capability."""
    monkeypatch.setattr(conv3x3_tiles, "capability", lambda device: request.param)
    return int(request.param)


def launches_of(
    samples: int,
    height: int,
    width: int,
    inputs: int,
    outputs: int,
    dtype: torch.dtype,
    input_precision: str = "tf32",
) -> list[Launch]:
    """Forward, input gradient with and without activation, weight gradient and its sums."""
    padded_inputs, padded_outputs = packing.padded_channels(inputs), packing.padded_channels(outputs)
    x, dz = (torch.empty((samples, height, width, channels), dtype=dtype) for channels in (inputs, outputs))
    forward = torch.empty((9 * padded_inputs, padded_outputs), dtype=dtype)
    backward = torch.empty((9 * padded_outputs, padded_inputs), dtype=dtype)
    common: dict[str, Any] = {"negative_slope": 0.1, "input_precision": input_precision}
    scale = torch.empty(())
    with recording() as launches:
        conv3x3.conv3x3_forward(x, forward, torch.empty(outputs), channels_out=outputs, **common)
        conv3x3.conv3x3_input_gradient(dz, backward, x, channels_out=inputs, **common)
        conv3x3.conv3x3_input_gradient(dz, backward, None, channels_out=inputs, scale=scale, **common)
        conv3x3_weight_gradient.conv3x3_weight_gradient(x, dz, bias=True, scale=scale, input_precision=input_precision)
    return launches


def assert_fits(launch: Launch, architecture: int) -> Machine:
    machine = compile_launch(launch, architecture)
    multiplies = "BK" in launch.arguments
    assert not machine.problems(tensor_cores=multiplies), launch
    # The newest instructions take 64 rows or more.
    rows = launch.arguments.get("BM", launch.arguments.get("ROWS", 0))
    newest = {80: "HMMA", 90: "HGMMA", 100: r"UTC\w*MMA"}[architecture]
    if multiplies and rows >= 64:
        assert machine.count(newest) > 0, launch
    if launch.arguments.get("DESCRIPTORS"):
        assert machine.count("UTMALDG") > 0
    return machine


@pytest.mark.parametrize(("samples", "size", "inputs", "outputs"), [(128, 8, 64, 32), (256, 7, 512, 256)])
def test_the_paper_s_layers(samples: int, size: int, inputs: int, outputs: int, architecture: int) -> None:
    for launch in launches_of(samples, size, size, inputs, outputs, torch.bfloat16):
        assert_fits(launch, architecture)


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "input_precision"), PRODUCTS[:2])
@pytest.mark.parametrize(("samples", "size", "inputs", "outputs"), LAYERS)
def test_named_layers(
    samples: int,
    size: int,
    inputs: int,
    outputs: int,
    dtype: torch.dtype,
    input_precision: str,
    architecture: int,
) -> None:
    for launch in launches_of(samples, size, size, inputs, outputs, dtype, input_precision):
        assert_fits(launch, architecture)


def representative(tile: Any, table: int) -> tuple[int, int]:
    """Channels in and out that a tile can be taken for."""
    if table == conv3x3_tiles.ODD:
        return tile.columns - 1, tile.columns - 1
    if isinstance(tile, conv3x3_tiles.WeightTile):
        return tile.rows, tile.columns
    return (512, 512) if tile.columns >= 128 else (64, tile.columns)


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "input_precision"), PRODUCTS)
@pytest.mark.parametrize("odd", [False, True])
def test_every_tile(
    odd: bool, dtype: torch.dtype, input_precision: str, architecture: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = conv3x3_tiles.ODD if odd else architecture
    for operation, tiles in conv3x3_tiles.CONVOLUTION_TILES.items():
        for tile in tiles[table, dtype.itemsize]:
            inputs, outputs = representative(tile, table)
            # As convolution_tile cuts it: no tile sums over more channels than there are.
            taken = tile._replace(channels=min(tile.channels, packing.padded_channels(inputs)))
            monkeypatch.setattr(conv3x3_tiles, "convolution_tile", lambda *args, taken=taken: taken)
            if operation == "forward":
                assert_fits(launches_of(2, 7, 7, inputs, outputs, dtype, input_precision)[0], architecture)
            else:
                for launch in launches_of(2, 7, 7, outputs, inputs, dtype, input_precision)[1:3]:
                    assert_fits(launch, architecture)
    for tile in conv3x3_tiles.WEIGHT_TILES[table, dtype.itemsize]:
        monkeypatch.setattr(conv3x3_tiles, "weight_tile", lambda *args, taken=tile: taken)
        inputs, outputs = representative(tile, table)
        assert_fits(launches_of(2, 7, 7, inputs, outputs, dtype, input_precision)[3], architecture)


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "input_precision"), PRODUCTS)
@pytest.mark.parametrize("channels", [(3, 12), (501, 100), (12, 501)], ids=str)
def test_odd_channels(channels: tuple[int, int], dtype: torch.dtype, input_precision: str, architecture: int) -> None:
    for launch in launches_of(2, 7, 7, *channels, dtype, input_precision):
        assert_fits(launch, architecture)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_every_named_layer_has_a_tile(dtype: torch.dtype, architecture: int) -> None:
    for samples, size, inputs, outputs in LAYERS:
        forward, gradient, _, weight, _ = launches_of(samples, size, size, inputs, outputs, dtype)
        assert forward.arguments["DESCRIPTORS"] == (architecture if architecture >= 90 else 0)
        # Half of a 132 multiprocessor device is busy at the least.
        for launch in (forward, gradient, weight):
            assert launch.grid[0] >= 64
        # No channel is padded in these layers, so tiles divide them.
        assert outputs % forward.arguments["BK"] == inputs % gradient.arguments["BK"] == 0
        assert inputs % weight.arguments["ROWS"] == outputs % weight.arguments["BK"] == 0


def test_new_shapes_keep_their_kernels() -> None:
    keys = set()
    for samples, height, width in [(1, 7, 7), (2, 5, 8), (5, 1, 6), (16, 16, 5)]:
        for launch in launches_of(samples, height, width, 64, 32, torch.bfloat16):
            keys.add(cache_key(launch))
    assert len(keys) == 5


def test_a_launch_s_number_of_taps_is_no_constant() -> None:
    # Known to the compiler it would be unrolled, and spill.
    forward = launches_of(2, 7, 7, 64, 64, torch.bfloat16)[0]
    assert "taps" not in [forward.kernel.arg_names[place] for place in forward.kernel.constexprs]
    assert cache_key(forward) == cache_key(forward._replace(arguments=forward.arguments | {"taps": 16}))


def activation_launches(channels: int, dtype: torch.dtype) -> list[Launch]:
    z, output = (torch.empty((4, 7, 7, channels), dtype=dtype) for _ in range(2))
    with recording() as launches:
        activation.bias_leaky_relu_(z, torch.empty(channels), 0.1)
        activation.leaky_relu_backward_(z, output, 0.1, torch.empty(()))
        activation.sum_partials(torch.empty(5, channels))
    return launches


def wide_share(machine: Machine) -> float:
    """The part of the loads and stores of global memory that move 16 bytes."""
    moves = re.findall(r"\b(?:LDG|STG)\.E\S*", machine.sass)
    return sum(".128" in move for move in moves) / len(moves)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("channels", [32, 512])
def test_activation_moves_16_bytes_at_once(channels: int, dtype: torch.dtype, architecture: int) -> None:
    in_place, backward, sums = (assert_fits(launch, architecture) for launch in activation_launches(channels, dtype))
    # The bias and the scale come on top.
    assert wide_share(in_place) >= 0.6
    assert wide_share(backward) >= 0.6
    assert wide_share(sums) >= 0.6


@pytest.mark.parametrize("backward", [False, True])
def test_packing_of_three_weights_is_one_launch(backward: bool, architecture: int) -> None:
    def weights(*sizes: int) -> list[Tensor]:
        return [torch.empty(size, 2 * size, 3, 3) for size in sizes]

    with recording() as launches:
        packing.pack_weights(weights(32, 64, 24), torch.bfloat16, backward=backward)
        packing.pack_weights(weights(512, 3), torch.bfloat16, backward=backward)
    assert len(launches) == 2
    assert cache_key(launches[0]) == cache_key(launches[1])
    assert_fits(launches[0], architecture)


@pytest.mark.parametrize("operation", [0, 1, 3])
def test_products_end_before_their_registers_are_written(operation: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Left operands that were masked or turned round are in registers, which the loop's next step writes."""
    monkeypatch.setattr(conv3x3_tiles, "capability", lambda device: 90)
    launch = launches_of(256, 7, 7, 512, 512, torch.bfloat16)[operation]
    machine = compile_launch(launch, 90)
    assert re.search(r"HGMMA\.\S+ R\d+, R\d+, gdesc", machine.sass)
    assert not re.search(r"WARPGROUP\.DEPBAR\.LE gsb0, 0x[1-9a-f]", machine.sass)
