"""What the compiler makes of the photographs' kernel, read from the machine code; no GPU is needed."""

import os

import pytest

if os.environ.get("TRITON_INTERPRET", "0") == "1":
    pytest.skip("with TRITON_INTERPRET=1 kernels are interpreted, not compiled", allow_module_level=True)
pytest.importorskip("triton", reason="the package triton is not installed")

from bench.machine_code.compiling import ARCHITECTURES, compile_launch
from bench.machine_code.shipped import ShippedLaunch
from bench.machine_code.shipped.crop_resize import shipped_launches

REGISTERS = 64  # 1,024 threads of a multiprocessor hide the latency of loads that all depend on a table's row


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("shipped", list(shipped_launches()), ids=lambda shipped: shipped.name)
def test_shipped_launches_use_no_stack_and_few_registers(shipped: ShippedLaunch, architecture: int) -> None:
    machine = compile_launch(shipped.launch, architecture)
    assert not machine.problems()
    assert machine.registers <= REGISTERS
    assert machine.shared == 0
