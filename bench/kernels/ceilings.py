"""What the machine gives, measured there and then: a copy and yardstick F of large tensors, and large matmuls."""

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from rich.table import Table
from torch import Tensor

from bench import peers
from bench.harness.gate import FORWARD_BACKWARD, Candidate, Group
from bench.harness.measuring import measure_groups
from bench.harness.records import Record, Row
from bench.harness.registry import Bench, Settings
from bench.kernels.layers import fastest_library
from bench.results import tables
from bench.results.throughput import MATMUL, rate

STEM = "ceilings"
# Elements of a side of a square matmul; a quick look takes the smaller.
MATMUL_SIZE = {"cpu": 2048, "cuda": 8192}
QUICK_MATMUL_SIZE = {"cpu": 768, "cuda": 4096}
# A tensor's bytes: several times any cache, so that memory is measured.
LARGE_BYTES = {"cpu": 2**28, "cuda": 2**29}
QUICK_LARGE_BYTES = {"cpu": 2**26, "cuda": 2**28}
FORMULA = "copy 2 and yardstick F 3 times the bytes of a tensor; matmul 2*size**3 FLOPs"


def copy_candidate(source: Tensor) -> Candidate:
    """A copy of a tensor, read and written once."""
    destination = torch.empty_like(source)
    return Candidate(peers.COPY, peers.COPY, lambda: destination.copy_(source), least_bytes=2 * source.nbytes)


def yardstick_candidate(student: Tensor, teacher: Tensor) -> Candidate:
    """Yardstick F, forward and backward; the student's factor requires a gradient."""

    def step() -> None:
        peers.yardstick(student, teacher).backward()

    def clear() -> None:
        student.grad = None

    return Candidate(peers.YARDSTICK, FORWARD_BACKWARD, step, prepare=clear, least_bytes=3 * student.nbytes)


def matmul_candidate(size: int, dtype: torch.dtype, device: torch.device) -> Candidate:
    """A square matmul."""
    # Random numbers: zeros draw less power and run faster.
    left, right = (torch.empty(size, size, device=device).uniform_(-1, 1).to(dtype) for _ in "ab")
    return Candidate(MATMUL, MATMUL, lambda: left @ right, details={"flops": 2 * size**3, "size": size})


def matmul_dtypes(device: torch.device) -> tuple[torch.dtype, ...]:
    """Those whose matmul is a ceiling of something; on a CPU float16 is no dtype to train in."""
    return (torch.float32, torch.bfloat16, torch.float16) if device.type == "cuda" else (torch.float32, torch.bfloat16)


def groups(settings: Settings) -> Iterator[Group]:
    """One group of memory, and one for the matmul of each dtype."""
    device = settings.device
    large = (QUICK_LARGE_BYTES if settings.quick else LARGE_BYTES)[device.type]
    size = (QUICK_MATMUL_SIZE if settings.quick else MATMUL_SIZE)[device.type]

    def memory() -> list[Candidate]:
        student, teacher = (torch.empty(large // 4, device=device).uniform_(-1, 1) for _ in "ab")
        return [copy_candidate(teacher), yardstick_candidate(student.requires_grad_(), teacher)]

    def matmul(dtype: torch.dtype) -> Callable[[], list[Candidate]]:
        return lambda: [matmul_candidate(size, dtype, device)]

    yield Group(STEM, f"memory, {large // 2**20} MiB", {"dtype": "float32", "bytes": large}, memory)
    for dtype in matmul_dtypes(device):
        name = str(dtype).removeprefix("torch.")
        yield Group(STEM, f"matmul {size}x{size}, {name}", {"dtype": name}, matmul(dtype))


def size(settings: Settings) -> int:
    """How often :func:`run` reports progress."""
    return (2 + len(matmul_dtypes(settings.device))) * (1 + settings.plan.blocks)


def run(settings: Settings, advance: Callable[[str], None]) -> list[Row]:
    """Measure every group."""
    # A call takes a good part of a second here on a CPU, and varies little.
    plan = replace(settings.plan, warmups=min(settings.plan.warmups, 1), calls=min(settings.plan.calls, 3))
    with fastest_library():
        return measure_groups(groups(settings), settings.device, plan, advance)


def show(rows: list[Row]) -> Iterator[Table]:
    """One table of all."""
    if not rows:
        return
    table = Table(title="what this machine gives", title_justify="left", title_style="bold")
    table.add_column("ceiling")
    table.add_column("of")
    for heading in ("median ms", "p20-p80 ms", "GB/s", "TFLOP/s"):
        table.add_column(heading, justify="right")
    for row in rows:
        timing = row.timing
        if timing is None:
            table.add_row(row.candidate, row.group, row.reason, style="red")
            continue
        spread = f"{tables.number(timing.p20)}-{tables.number(timing.p80)}"
        figures = (tables.number(timing.median), spread, tables.number(row.gbps), tables.number(rate(row)))
        table.add_row(row.candidate, row.group, *figures)
    yield table


def markdown(newest: dict[str, tuple[str, Record]], brief: bool = False) -> str:
    """The block of the README and of docs/benchmarks.md."""

    def found_in(_: str, record: Record) -> tuple[str, list[str]]:
        lines = [
            [row.candidate, row.group, tables.number(row.gbps), tables.number(rate(row))] for row in record.of(STEM)
        ]
        return "", [tables.markdown_table(("ceiling", "of", "GB/s", "TFLOP/s"), lines, numbers_from=2)]

    return tables.by_device(newest, found_in, brief)


BENCH = Bench(
    summary="what the machine gives: copy and yardstick F of large tensors, matmuls in every dtype",
    size=size,
    run=run,
    tables=show,
    markdown=markdown,
    formula=FORMULA,
)
