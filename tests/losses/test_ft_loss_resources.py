"""What the compiler makes of the loss's Triton kernels, read from the machine code; no GPU is needed."""

import os
import re
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

if os.environ.get("TRITON_INTERPRET", "0") == "1":
    pytest.skip("with TRITON_INTERPRET=1 kernels are interpreted, not compiled", allow_module_level=True)
pytest.importorskip("triton", reason="the package triton is not installed")
kernels = pytest.importorskip("ftfast.kernels.ft_loss")

from bench.machine_code.compiling import ARCHITECTURES, Launch, Machine, cache_key, compile_launch, recorded  # noqa: E402
from bench.machine_code.shipped import ShippedLaunch  # noqa: E402
from bench.machine_code.shipped.ft_loss import run_launchers, shipped_launches  # noqa: E402

BUCKETS = [2**power for power in range(7, 15)]


@pytest.fixture
def launches() -> Iterator[list[Launch]]:
    """Collects what the launchers would launch, and launches nothing."""
    with recorded(kernels) as recorded_launches:
        yield recorded_launches


def _assert_fits(machine: Machine) -> None:
    assert not machine.problems()
    # A contracted x * r - y * r is not 0 for equal factors.
    assert "fma.rn" not in machine.ptx


def _assert_wide(machine: Machine, launch: Launch) -> None:
    """Factors move in 16-byte pieces, and in no other: every byte of a block is in one of them."""
    forward = "SINGLE_PASS" in launch.arguments
    passes = 1 if not forward or launch.arguments["SINGLE_PASS"] else 2
    threads = 32 * launch.options["num_warps"]
    factors = [launch.arguments["student"], launch.arguments["teacher"]]
    read = passes * launch.arguments["BLOCK"] * sum(factor.element_size() for factor in factors)
    loads = re.findall(r"\bLDG\.E\S*", machine.sass)
    wide = [load for load in loads if ".128" in load]
    assert len(wide) * 16 * threads >= read
    # What is left: the statistics, upstream and weight in backward, the samples' losses in forward's final sum.
    narrow = [load for load in loads if ".128" not in load and "STRONG" not in load]
    assert len(narrow) <= (1 if forward else 7)
    assert not [load for load in narrow if re.search(r"\.[US](8|16)", load)]
    if not forward:
        stores = re.findall(r"\bSTG\.E\S*", machine.sass)
        assert all(".128" in store for store in stores)
        written = launch.arguments["BLOCK"] * sum(factor.element_size() for factor in factors)
        assert len(stores) * 16 * threads >= written


def _factors(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return torch.empty(shape, dtype=dtype), torch.empty(shape, dtype=dtype)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("shipped", list(shipped_launches()), ids=lambda shipped: shipped.name)
def test_shipped_launches(shipped: ShippedLaunch, architecture: int) -> None:
    machine = compile_launch(shipped.launch, architecture)
    _assert_fits(machine)
    _assert_wide(machine, shipped.launch)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("size", [*BUCKETS, 2 * BUCKETS[-1]])
def test_every_bucket(size: int, dtype: torch.dtype, p: int, architecture: int, launches: list[Launch]) -> None:
    run_launchers(*_factors((2, 16, size // 16), dtype), p=p)
    for launch in launches:
        machine = compile_launch(launch, architecture)
        _assert_fits(machine)
        if size >= 1024:  # smaller blocks have lanes that share an address
            _assert_wide(machine, launch)


def _unlike(rank: int, size: int) -> tuple[Tensor, Tensor]:
    """Factors of about ``size`` numbers a sample that leave ``rank`` inner dimensions."""
    side = int(size ** (1 / rank))
    shape = (2, *[side] * rank)
    wide = torch.empty((2, *[side + 1] * rank))
    return torch.empty(shape), wide[(slice(None), *[slice(0, side)] * rank)]


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("rank", [2, 3, 4])
@pytest.mark.parametrize("size", [8000, 16384, 40000])
def test_unlike_strides(rank: int, size: int, architecture: int, launches: list[Launch]) -> None:
    run_launchers(*_unlike(rank, size))
    for launch in launches:
        assert launch.arguments["RANK"] == rank
        _assert_fits(compile_launch(launch, architecture))


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("shape", [(2, 64, 8, 8), (2, 256, 7, 7), (2, 3, 37, 37), (2, 3, 101, 101)], ids=str)
@pytest.mark.parametrize(
    ("student", "teacher"),
    [
        (torch.float64, torch.float64),
        (torch.float32, torch.float64),
        (torch.float32, torch.bfloat16),
        (torch.float16, torch.int8),
        (torch.bfloat16, torch.float8_e4m3fn),
    ],
    ids=str,
)
def test_other_dtypes_and_odd_channels_do_not_spill(
    student: torch.dtype,
    teacher: torch.dtype,
    shape: tuple[int, ...],
    architecture: int,
    launches: list[Launch],
) -> None:
    if teacher == torch.float8_e4m3fn and architecture == 80:
        pytest.skip("compute capability 8.0 has no float8_e4m3fn")
    weight = torch.ones(())
    run_launchers(torch.empty(shape, dtype=student), torch.empty(shape, dtype=teacher), weight=weight)
    for launch in launches:
        _assert_fits(compile_launch(launch, architecture))


def test_the_final_sum_is_ordered_after_every_sample(launches: list[Launch]) -> None:
    run_launchers(*_factors((2, 32, 8, 8), torch.float32))
    ptx = compile_launch(launches[0], 90).ptx
    count = re.search(r"atom\S*\.acq_rel\S*\.add", ptx)
    assert count is not None
    before, after = ptx[: count.start()], ptx[count.end() :]
    # store, barrier, count; then loads that bypass L1
    assert before.rindex("bar.sync") > before.rindex("st.global")
    assert "ld.global.cg" in after
    assert "ld.global.cg" not in before
    assert len(re.findall(r"\b(?:atom|red)\.", ptx)) == 1


def test_new_shapes_keep_their_kernel_within_a_power_of_two(launches: list[Launch]) -> None:
    sizes = [(1, 7, 7), (2, 7, 7), (5, 8, 6), (16, 5, 9), (255, 6, 6), (256, 8, 8)]
    for samples, height, width in sizes:
        assert 1024 < 32 * height * width <= 2048
        run_launchers(*_factors((samples, 32, height, width), torch.bfloat16))
    assert len({cache_key(launch) for launch in launches}) == 2  # forward and backward


def test_values_that_change_every_step_keep_their_kernel(launches: list[Launch]) -> None:
    student, teacher = _factors((4, 32, 7, 7), torch.float32)
    for weight in (1.0, 0.0, 500.0, 16.0, 1e-3):
        run_launchers(student, teacher, weight=weight)
    assert len({cache_key(launch) for launch in launches}) == 2
    launches.clear()
    for weight in (1.0, 16.0):
        run_launchers(student, teacher, weight=torch.tensor(weight))
    assert len({cache_key(launch) for launch in launches}) == 2


def test_sample_strides_and_start_addresses_keep_their_kernel(launches: list[Launch]) -> None:
    storage = torch.empty(9, 96, 7, 7)
    for first in (0, 16, 32):
        student = storage[1 : 1 + first // 16 + 1, first : first + 48]
        run_launchers(student, torch.empty(student.shape))
    assert {launch.arguments["ALIGN"] for launch in launches} == {16}
    forward = [launch for launch in launches if "SINGLE_PASS" in launch.arguments]
    assert len({cache_key(launch) for launch in forward}) == 1


def test_odd_addresses_of_weight_and_upstream_keep_their_kernel(launches: list[Launch]) -> None:
    student, teacher = _factors((4, 32, 7, 7), torch.float32)
    numbers = torch.ones(8)
    for place in (0, 1, 4):
        _, statistics = kernels.ft_loss_forward(
            student, teacher, p=1, reduction="none", eps=1e-12, weight=numbers[place]
        )
        kernels.ft_loss_backward(
            student,
            teacher,
            statistics,
            numbers[place : place + 4],
            p=1,
            reduction="none",
            weight=numbers[place],
            student_gradient=True,
            teacher_gradient=False,
        )
    assert len({cache_key(launch) for launch in launches}) == 2


def test_unlike_strides_of_new_sizes_keep_their_kernel(launches: list[Launch]) -> None:
    for height, width in [(7, 7), (5, 9), (8, 8), (6, 7)]:
        student, teacher = _factors((2, 32, height, width), torch.float32)
        run_launchers(student, teacher.to(memory_format=torch.channels_last))
    assert {launch.arguments["RANK"] for launch in launches} == {2}
    assert len({cache_key(launch) for launch in launches}) == 2


def test_a_launch_carries_no_descriptor(launches: list[Launch]) -> None:
    # A tensor descriptor costs about as much Python as the rest of a launch.
    run_launchers(*_factors((2, 32, 8, 8), torch.float32))
    for launch in launches:
        for value in launch.arguments.values():
            assert isinstance(value, Tensor | int | float | tuple)
