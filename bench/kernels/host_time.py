"""What loss and head take of the host's processor on a GPU: Python, autograd and launches, the device not waited for.

An eager training is bound by this wherever its kernels are short. Times of an ``autograd.Function`` that does nothing
stand beside, which is the least that any loss with a backward of its own can take.
"""

import gc
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

import ftfast
from bench import peers
from bench.harness.gate import FORWARD, FORWARD_BACKWARD
from bench.harness.measuring import raised, summarise
from bench.harness.records import Record, Row
from bench.harness.registry import Bench, Settings
from bench.kernels import heads
from bench.kernels.ft_loss import KERNELS, OF_BACKEND, OURS
from bench.kernels.loss_cases import factors
from bench.peers import Loss
from bench.results import tables
from bench.shapes import SHAPES
from ftfast import dispatch
from ftfast.commands.tune.heads import HEADS, HeadShape

STEM = "host_time"
EMPTY = "empty autograd.Function"
OFFICIAL = "official formula"
EAGER_HEAD = "eager head"
NAME = "cifar-r56-r20"
DTYPE = torch.bfloat16
BLOCKS, QUICK_BLOCKS = 20, 2
# All launches of a block together stay below what a device's queue takes.
CALLS = {FORWARD: 10, FORWARD_BACKWARD: 5}
SMALL_HEAD = HeadShape("small", 8, 16, 16, 8, 4, 4)


class Empty(torch.autograd.Function):
    """Saves its inputs and allocates its results: what autograd alone costs."""

    @staticmethod
    def forward(ctx: Any, student_factor: Tensor, teacher_factor: Tensor) -> Tensor:
        ctx.save_for_backward(student_factor, teacher_factor)
        return student_factor.new_empty((), dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        student_factor, _ = ctx.saved_tensors
        return torch.empty_like(student_factor), None


def losses(settings: Settings) -> dict[str, Loss]:
    """By name."""
    found: dict[str, Loss] = {EMPTY: Empty.apply, OURS: ftfast.FTLoss()}
    for backend in KERNELS:
        if dispatch.supports(backend, settings.device, DTYPE, DTYPE).ok:
            found[OF_BACKEND[backend]] = ftfast.FTLoss(backend=backend)
    return {**found, OFFICIAL: peers.official_formula}


def cases(settings: Settings) -> Iterator[tuple[str, dict[str, Loss], Tensor, Tensor, list[Tensor]]]:
    """Of loss and head: a title, the ways by name, what they are called with, and what gets a gradient."""
    student, teacher = factors(SHAPES[NAME], DTYPE, "channels_last", settings.device, settings.plan.seed)
    yield f"loss of {SHAPES[NAME]}, bfloat16", losses(settings), student, teacher, [student]
    shape = SMALL_HEAD if settings.quick else HEADS[NAME]
    with_ = heads.operands(shape, DTYPE, settings.device, settings.plan.seed)
    ways: dict[str, Loss] = {EAGER_HEAD: heads.eager_head(with_), OURS: heads.our_head(with_)}
    ways |= {f"{OURS}, {way}": loss for way, loss in heads.ways(with_).items()}
    yield f"head of {shape}, bfloat16", ways, with_.student, with_.teacher, list(with_.leaves().values())


def size(settings: Settings) -> int:
    """How often :func:`run` reports progress."""
    return sum(len(ways) for _, ways, *_ in cases(settings))


def run(settings: Settings, advance: Callable[[str], None]) -> list[Row]:
    """Time every way, forward alone and with its backward."""
    rows = []
    for title, ways, student, teacher, leaves in cases(settings):
        for name, loss in ways.items():
            advance(f"{title}: {name}")
            count = QUICK_BLOCKS if settings.quick else BLOCKS
            for row in _rows(title, name, loss, student, teacher, leaves, count):
                settings.plan.known(row)
                rows.append(row)
    return rows


def _rows(
    title: str, name: str, loss: Loss, student: Tensor, teacher: Tensor, leaves: list[Tensor], count: int
) -> Iterator[Row]:
    def forward() -> None:
        loss(student, teacher)

    def forward_backward() -> None:
        for leaf in leaves:
            leaf.grad = None
        loss(student, teacher).backward()

    for work, step in ((FORWARD, forward), (FORWARD_BACKWARD, forward_backward)):
        try:
            blocks = _blocks(step, CALLS[work], count)
        except Exception as error:  # the others are still to be measured
            yield Row(STEM, title, name, work, None, reason=raised(error))
            continue
        yield Row(STEM, title, name, work, summarise([[milliseconds] for milliseconds in blocks]))


def _blocks(step: Callable[[], None], calls: int, count: int) -> list[float]:
    """Milliseconds of a call, of all threads, each the mean of a block that begins with an idle device."""
    for _ in range(5):
        step()
    found = []
    gc.collect()
    gc.disable()
    try:
        for _ in range(count):
            torch.cuda.synchronize()
            begin = time.process_time_ns()
            for _ in range(calls):
                step()
            found.append((time.process_time_ns() - begin) * 1e-6 / calls)
    finally:
        gc.enable()
    torch.cuda.synchronize()
    return found


def _lines(rows: list[Row]) -> Iterator[list[str]]:
    """Microseconds of every way in its quietest block, and of both passes in multiples of the first way's."""
    found = {(row.candidate, row.work): row for row in rows}
    least: float | None = None
    for name in dict.fromkeys(row.candidate for row in rows):
        cells, ratio = [name], ""
        for work in (FORWARD, FORWARD_BACKWARD):
            row = found[name, work]
            if row.timing is None:
                cells.append(row.reason)
                continue
            quietest = min(row.timing.block_medians)
            cells.append(tables.number(quietest * 1e3))
            if work == FORWARD_BACKWARD:
                least = least or quietest
                ratio = tables.number(quietest / least)
        yield [*cells, ratio]


HEADINGS = ("way", "forward, us", "forward+backward, us", "ratio to the first")


def show(rows: list[Row]) -> Iterator[Table]:
    """A table for the loss and one for the head."""
    for title in dict.fromkeys(row.group for row in rows):
        table = Table(title=title, title_justify="left", title_style="bold")
        for place, heading in enumerate(HEADINGS):
            table.add_column(heading, justify="right" if place else "left")
        for line in _lines([row for row in rows if row.group == title]):
            table.add_row(*line)
        yield table


def markdown(newest: dict[str, tuple[str, Record]], brief: bool = False) -> str:
    """The block of docs/benchmarks.md."""

    def found_in(_: str, record: Record) -> tuple[str, list[str]]:
        rows, shown = record.of(STEM), []
        for title in dict.fromkeys(row.group for row in rows):
            lines = list(_lines([row for row in rows if row.group == title]))
            shown += [f"{title}:", tables.markdown_table(HEADINGS, lines, numbers_from=1)]
        return ". Processor time in the quietest block", shown

    if "cuda" not in newest:
        return f"CUDA GPU: {tables.NOT_MEASURED}."
    return tables.by_device({"cuda": newest["cuda"]}, found_in, brief=True)


def refuses(settings: Settings) -> str:
    """It is a GPU's host that is measured."""
    return "" if settings.device.type == "cuda" else f"{STEM} needs a CUDA device, and there is none."


BENCH = Bench(
    summary="what loss and head cost the host on a GPU, against an empty autograd.Function, the formula, eager modules",
    size=size,
    run=run,
    tables=show,
    markdown=markdown,
    refuses=refuses,
)
