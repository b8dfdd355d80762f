"""What the compiler makes of the attention maps' Triton kernels, read from the machine code; no GPU is needed."""

import os

import pytest

if os.environ.get("TRITON_INTERPRET", "0") == "1":
    pytest.skip("with TRITON_INTERPRET=1 kernels are interpreted, not compiled", allow_module_level=True)
pytest.importorskip("triton", reason="the package triton is not installed")
pytest.importorskip("ftfast.kernels.attention")

from bench.machine_code import ARCHITECTURES, compile_launch
from bench.shipped import ShippedLaunch
from bench.shipped.attention import shipped_launches


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("shipped", list(shipped_launches()), ids=lambda shipped: shipped.name)
def test_shipped_launches_use_no_stack_and_wide_loads(shipped: ShippedLaunch, architecture: int) -> None:
    machine = compile_launch(shipped.launch, architecture)
    assert not machine.problems()
    # 196 numbers a row leave bfloat16 rows aligned to 8 bytes, channels_last ones to 16.
    assert ".128" in machine.sass or ".64" in machine.sass
