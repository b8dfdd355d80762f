"""What the compiler makes of the attention maps' Triton kernels, read from the machine code; no GPU is needed."""

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET", "0") == "1":
    pytest.skip("with TRITON_INTERPRET=1 kernels are interpreted, not compiled", allow_module_level=True)
pytest.importorskip("triton", reason="the package triton is not installed")
kernels = pytest.importorskip("ftfast.kernels.attention")

from bench.machine_code.compiling import ARCHITECTURES, Machine, compile_launch, recorded  # noqa: E402
from bench.machine_code.shipped import ShippedLaunch  # noqa: E402
from bench.machine_code.shipped.attention import shipped_launches  # noqa: E402


def assert_wide(machine: Machine, element_bytes: int, piece_bytes: int, forward: bool) -> None:
    """Features, and their gradient, move in pieces of this size and in no other."""
    threads = 32 * kernels.OPTIONS["num_warps"]
    pieces = kernels.TILE * element_bytes // (threads * piece_bytes)
    width = rf"\.E\.{8 * piece_bytes}\b"
    assert machine.count("LDG" + width) >= pieces
    if forward:
        assert machine.count("LDG") == pieces
    else:
        assert machine.count("STG") == machine.count("STG" + width) == pieces


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("shipped", list(shipped_launches()), ids=lambda shipped: shipped.name)
def test_shipped_launches_use_no_stack_and_wide_loads(shipped: ShippedLaunch, architecture: int) -> None:
    machine = compile_launch(shipped.launch, architecture)
    assert not machine.problems()
    element_bytes = shipped.launch.arguments["features"].element_size()
    # 14 * 14 numbers a row have a factor of 4, so bfloat16 rows are aligned to 8 bytes; 256 channels to 16.
    in_rows = not shipped.launch.arguments["CHANNELS_LAST"]
    assert_wide(machine, element_bytes, 8 if in_rows and element_bytes == 2 else 16, "maps" in shipped.launch.arguments)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["nchw", "channels_last"])
@pytest.mark.parametrize(
    ("shape", "dtype", "exponent"),
    [
        ((128, 64, 8, 8), torch.float16, 2),
        ((64, 512, 7, 7), torch.float16, 4),
        ((2, 3, 300, 300), torch.float32, 1),
        ((1, 1, 1, 1), torch.bfloat16, 3),
    ],
    ids=str,
)
def test_other_sizes_use_no_stack(
    shape: tuple[int, ...], dtype: torch.dtype, exponent: int, memory_format: torch.memory_format, architecture: int
) -> None:
    features = torch.empty(shape, dtype=dtype).contiguous(memory_format=memory_format)
    with recorded(kernels) as launches:
        maps = kernels.attention_map(features, exponent)
        kernels.attention_gradient(features, maps, exponent)
    for launch in launches:
        assert not compile_launch(launch, architecture).problems()
