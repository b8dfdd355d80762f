"""``python -m bench resources``: every shipped launch is in it, and one that should not be shipped is red."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

CHECKOUT = Path(__file__).resolve().parents[2]


@pytest.mark.process
def test_the_interpreter_is_refused_in_one_sentence() -> None:
    pytest.importorskip("triton", reason="the package triton is not installed")
    finished = subprocess.run(
        [sys.executable, "-m", "bench", "resources"],
        cwd=CHECKOUT,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 2
    error = finished.stderr.strip().rpartition("error: ")[2]
    assert "TRITON_INTERPRET" in error
    assert "\n" not in error


if os.environ.get("TRITON_INTERPRET", "0") == "1":
    pytest.skip("with TRITON_INTERPRET=1 kernels are interpreted, not compiled", allow_module_level=True)
triton = pytest.importorskip("triton", reason="the package triton is not installed")

from triton import language as tl  # noqa: E402

from bench.__main__ import main  # noqa: E402
from bench.harness import records  # noqa: E402
from bench.machine_code import compiling, resources, shipped  # noqa: E402
from bench.machine_code.compiling import Machine, cache_key, compile_launch, kernel_names, recorded  # noqa: E402
from bench.machine_code.shipped import ShippedLaunch  # noqa: E402


@triton.jit
def _sum_of_products_kernel(left, right, out, pair, scale, rounds, SIZE: tl.constexpr):
    lanes = tl.arange(0, SIZE)
    rows = lanes[:, None] * SIZE + lanes[None, :]
    total = tl.zeros((SIZE, SIZE), tl.float32)
    for _ in range(rounds):
        total = tl.dot(tl.load(left + rows), tl.load(right + rows), total)
    tl.store(out + rows, total * scale + pair[0] - pair[1])


@triton.jit
def _described_kernel(left, right, out, SIZE: tl.constexpr):
    product = tl.dot(left.load([0, 0]), right.load([0, 0]))
    out.store([0, 0], product.to(tl.bfloat16))


def launch_products(size: int, *, number: float = 0.5, rounds: int = 3, warps: int = 4, skip: int = 0) -> None:
    left = torch.empty(skip + size * size, dtype=torch.bfloat16)[skip:]
    out = torch.empty(size, size)
    _sum_of_products_kernel[(1,)](
        left, left, out, (2, 7), number, rounds, SIZE=size, num_warps=warps, enable_fp_fusion=True
    )


def launch_described(size: int) -> None:
    from triton.tools.tensor_descriptor import TensorDescriptor

    described = TensorDescriptor.from_tensor(torch.empty(2 * size, 2 * size, dtype=torch.bfloat16), [size, size])
    _described_kernel[(1,)](described, described, described, SIZE=size, enable_fp_fusion=True)


THIS_MODULE: Any = sys.modules[__name__]


@pytest.mark.parametrize("architecture", compiling.ARCHITECTURES)
def test_what_a_launch_compiles_to(architecture: int) -> None:
    with recorded(THIS_MODULE, "_sum_of_products_kernel") as launches:
        launch_products(64)
    machine = compile_launch(launches[0], architecture)
    assert not machine.problems(tensor_cores=True)
    assert 0 < machine.tensor_core_instructions < machine.instructions
    assert machine.warps == 4
    assert machine.count("STG") > 0
    assert f".target sm_{architecture}" in machine.ptx


@pytest.mark.parametrize("architecture", [90, 100])
def test_descriptors_are_compiled_as_such(architecture: int) -> None:
    with recorded(THIS_MODULE, "_described_kernel") as launches:
        launch_described(64)
    machine = compile_launch(launches[0], architecture)
    assert machine.count("UTMALDG") > 0
    assert not machine.problems(tensor_cores=True)


def test_recording_launches_nothing_and_puts_the_kernels_back() -> None:
    before = _sum_of_products_kernel
    with recorded(THIS_MODULE) as launches:
        launch_products(32, warps=2)
        assert launches[0].arguments["pair"] == (2, 7)
        assert launches[0].options == {"num_warps": 2, "enable_fp_fusion": True}
        assert launches[0].grid == (1,)
    assert THIS_MODULE._sum_of_products_kernel is before
    assert kernel_names(THIS_MODULE) == ["_sum_of_products_kernel", "_described_kernel"]


def test_what_changes_the_kernel_changes_its_key() -> None:
    with recorded(THIS_MODULE) as launches:
        launch_products(32)
        launch_products(32, number=7.25)
        launch_products(32, rounds=5)
        launch_products(32, rounds=16)
        launch_products(32, warps=8)
        launch_products(32, skip=1)
        launch_products(64)
    first, *others = [cache_key(launch) for launch in launches]
    assert [key == first for key in others] == [True, True, False, False, False, False]


def test_every_launch_that_should_not_be_shipped_says_why() -> None:
    fields = {"architecture": 90, "warps": 4, "registers": 64, "stack": 0, "shared": 0, "tensor_memory": 0}

    def problems(sass: str = "", **changes: int) -> str:
        machine = Machine(**{**fields, **changes}, sass=sass, ptx="")  # type: ignore[arg-type]
        return "; ".join(machine.problems(tensor_cores=True))

    tensor_core = "        /*0010*/                   HGMMA.64x8x16.F32.BF16 R24, gdesc[UR4], R24 ;\n"
    assert problems(tensor_core) == ""
    assert "no tensor-core" in problems()
    assert "16 bytes of stack" in problems(tensor_core, stack=16)
    assert "shared memory (limit 232448)" in problems(tensor_core, shared=232449)
    assert "shared memory (limit 166912)" in problems(tensor_core, shared=232448, architecture=80)
    assert problems(tensor_core, registers=128, warps=16) == ""
    assert "registers" in problems(tensor_core, registers=129, warps=16)
    assert "local memory" in problems(tensor_core + "        /*0020*/              @!P0 STL.64 [R1], R2 ;\n")
    # Left operands that were masked or turned round are in registers, which the loop's next step writes.
    in_registers = "        /*0010*/                   HGMMA.64x8x16.F32.BF16 R24, R4, gdesc[UR4], R24 ;\n"
    some_go_on, all_ended = (
        f"        /*0020*/                   WARPGROUP.DEPBAR.LE gsb0, {left} ;\n" for left in ("0x1", "0x0")
    )
    assert "may still run" in problems(in_registers + some_go_on)
    assert problems(in_registers + all_ended) == problems(tensor_core + some_go_on) == ""


def spilling_launch() -> list[ShippedLaunch]:
    with recorded(THIS_MODULE) as launches:
        launch_products(128, warps=1)
    return [ShippedLaunch("128 in one warp", launches[0], (90,), tensor_cores=True)]


def test_a_spill_is_red_and_the_status_is_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(shipped, "discover", lambda: {"spilling": spilling_launch})
    out = tmp_path / "record.json"
    assert main(["resources", "--out", str(out)]) == 1
    (row,) = records.load(out).of("resources")
    assert "bytes of stack" in row.reason
    assert row.details["stack"] > 0
    assert row.details["triton"] == triton.__version__
    assert "128 in one warp, sm_90: " in " ".join(capsys.readouterr().out.split())


def test_quick_resources_compile_a_launch_of_every_feature(tmp_path: Path) -> None:
    out = tmp_path / "record.json"
    assert main(["resources", "--quick", "--out", str(out)]) == 0
    rows = records.load(out).of("resources")
    assert {row.group for row in rows} == set(shipped.discover())
    for row in rows:
        assert row.work == "sm_90"
        assert row.details["registers"] > 0
    assert "ft_loss" in resources.markdown({"cpu": ("", records.load(out))})


def test_every_feature_names_its_launches_apart() -> None:
    for feature, shipped_launches in shipped.discover().items():
        shipped_for = [(launch.name, launch.architectures) for launch in shipped_launches()]
        names = [(name, architecture) for name, architectures in shipped_for for architecture in architectures]
        assert names, feature
        assert len(set(names)) == len(names), feature
