"""Steps from a factor store against those with a teacher, and how fast the store's reader is by itself."""

import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path

import torch
from rich.table import Table
from torch import Tensor

from bench.harness import gate
from bench.harness.clocks import clock_for, graph_replay
from bench.harness.gate import Candidate, Group
from bench.harness.measuring import measure_group, summarise
from bench.harness.records import Record, Row
from bench.harness.registry import Bench, Settings
from bench.results import tables
from bench.training.step_peers import CIFAR, IMAGENET, SMALL, Operands, Pair, Step, StepJudge, official, ours
from bench.training.store_files import (
    IMAGENET_FACTOR,
    Disk,
    factors_of,
    forget,
    same_batch,
    shuffled,
    write_store,
)
from ftfast.distillation.store.read import Store
from ftfast.distillation.store.stored_images import make_ahead

STEM = "store"
STEP, READ = "step", "read"
OFFICIAL, LIVE, STORED, NO_TEACHER = "official", "live teacher", "from a store", "no teacher"
READING = "reading a batch"
MEMORY, FROM_DISK, DISK = "reader, from memory", "reader, from disk", "disk alone"
BATCH, QUICK_BATCH = 128, 16
LARGE_BATCH = 256
REPEATED, QUICK_REPEATED = 64, 4
READ_BATCH = 256
FILE_BYTES, QUICK_FILE_BYTES = 4 << 30, 16 << 20
READ_BLOCK, QUICK_READ_BLOCK = 100, 4  # batches
# How many times faster the step from a store has to be, and how many factors a second the reader has to give.
TARGETS = {("cpu", OFFICIAL): 7.0, ("cpu", LIVE): 1.4, ("cuda", LIVE): 1.3}
MOST_READING = 0.02
READER_TARGET = 8000


def group_name(pair: Pair, batch: int) -> str:
    """The name of a table of steps."""
    return f"{pair.title}, {batch}x3x{pair.size}x{pair.size}, SGD, synthetic images"


def reader_group(settings: Settings) -> str:
    """The name of the reader's table."""
    size = QUICK_FILE_BYTES if settings.quick else FILE_BYTES
    return f"factors of {'x'.join(map(str, IMAGENET_FACTOR))} in int8, shuffled, out of {size / 1e9:.2g} GB"


def cases(settings: Settings) -> list[tuple[Pair, int]]:
    """The pair of networks with its batch; photographs' size needs a GPU."""
    if settings.quick:
        return [(SMALL, QUICK_BATCH)]
    return [(IMAGENET, LARGE_BATCH)] if settings.device.type == "cuda" else [(CIFAR, BATCH)]


def candidates(settings: Settings, pair: Pair, batch: int, stack: ExitStack) -> list[Candidate]:
    """The steps, each with the store's file and reader where it has one; ``stack`` ends them."""
    with_ = Operands(pair, batch, settings.device, settings.plan.seed)
    judge = StepJudge(with_)
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    images = batch * (QUICK_REPEATED if settings.quick else REPEATED)
    store = stack.enter_context(closing(write_store(folder, factors_of(with_), images)))
    pinned = settings.device.type == "cuda"
    rows = same_batch(store, batch, settings.plan.seed)
    ahead = stack.enter_context(closing(make_ahead(partial(store.read, pinned=pinned), rows)))
    again = same_batch(store, batch, settings.plan.seed + 1)

    def stored() -> tuple[Tensor, ...]:
        return tuple(tensor.to(settings.device, non_blocking=True) for tensor in next(ahead))

    compiled = settings.device.type == "cuda" and "compile" in settings.peers
    ways = {
        OFFICIAL: official(with_),
        LIVE: ours(with_, "ft", compiled=compiled),
        STORED: ours(with_, "ft", stored=stored, compiled=compiled),
        NO_TEACHER: ours(with_, "none", compiled=compiled),
    }
    found = [_candidate(name, step, judge) for name, step in ways.items()]
    if settings.device.type == "cuda":
        found.append(_replayed(with_, stored, compiled, judge))
    row_bytes = int(torch.Size(store.header.factor).numel())
    reading = Candidate(
        READING,
        READ,
        lambda: store.read(next(again), pinned=pinned),
        least_bytes=2 * batch * row_bytes,
        details={"factors": batch},
    )
    return [*found, reading]


def _replayed(with_: Operands, stored: Callable[[], tuple[Tensor, ...]], compiled: bool, judge: StepJudge) -> Candidate:
    """The step as a graph, which reads its factors where each next batch's are copied to."""
    kept = stored()
    step = ours(with_, "ft", stored=lambda: kept, compiled=compiled)

    def fill() -> None:
        for place, found in zip(kept, stored(), strict=True):
            place.copy_(found)

    return graph_replay(_candidate(STORED, step, judge), fill)


def _candidate(name: str, step: Step, judge: StepJudge) -> Candidate:
    def verdict() -> gate.Errors:
        return judge(step, is_float32=name == OFFICIAL)

    computes = "float32 NCHW" if name == OFFICIAL else "bfloat16 autocast, channels_last"
    # Without a teacher it is another loss: there is nothing to compare it with.
    return Candidate(name, STEP, step.run, gate=None if name == NO_TEACHER else verdict, details={"computes": computes})


def size(settings: Settings) -> int:
    """How often :func:`run` reports progress."""
    reads = 3 if settings.device.type == "cpu" else 0
    steps = 6 if settings.device.type == "cuda" else 5
    return len(cases(settings)) * steps * (1 + settings.plan.blocks) + reads * settings.plan.blocks


def run(settings: Settings, advance: Callable[[str], None]) -> list[Row]:
    """Measure the steps, then the reader, which is the processor's alone."""
    clock = clock_for(settings.device)
    rows: list[Row] = []
    for pair, batch in cases(settings):
        names = {"teacher": pair.teacher, "student": pair.student, "device": settings.device.type}
        details = {**names, "dims": [batch, 3, pair.size, pair.size]}
        with ExitStack() as stack:
            # Built before the group is measured, for the group's own builder cannot end what it began.
            made = candidates(settings, pair, batch, stack)
            group = Group(STEM, group_name(pair, batch), details, lambda made=made: made)  # type: ignore[misc]
            rows += measure_group(group, clock, settings.plan, advance)
    return rows + (_read_rows(settings, advance) if settings.device.type == "cpu" else [])


def _read_rows(settings: Settings, advance: Callable[[str], None]) -> list[Row]:
    """The reader's rate from memory and from disk, and the disk's own."""
    names = (MEMORY, FROM_DISK, DISK)
    wanted = QUICK_FILE_BYTES if settings.quick else FILE_BYTES
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        free = shutil.disk_usage(folder).free
        if free < 2 * wanted:
            reason = f"{folder.parent} has {free / 1e9:.3g} GB free, and twice {wanted / 1e9:.3g} GB are wanted"
            return [Row(STEM, reader_group(settings), name, READ, None, reason=reason) for name in names]
        noise = torch.randn(READ_BATCH, *IMAGENET_FACTOR, generator=torch.Generator().manual_seed(settings.plan.seed))
        images = wanted // noise[0].numel() // READ_BATCH * READ_BATCH
        store = stack.enter_context(closing(write_store(folder, noise, images)))
        disk = stack.enter_context(closing(Disk(store)))
        elapsed: dict[str, list[list[float]]] = {name: [] for name in names}
        batches = QUICK_READ_BLOCK if settings.quick else READ_BLOCK
        for block in range(settings.plan.blocks):
            for name in names:
                advance(name)
                elapsed[name].append(_read_block(store, disk, name, batches, block))
    return [
        Row(
            STEM,
            reader_group(settings),
            name,
            READ,
            summarise(elapsed[name]),
            least_bytes=READ_BATCH * noise[0].numel(),
            details={"factors": READ_BATCH, "file_bytes": images * noise[0].numel()},
        )
        for name in names
    ]


def _read_block(store: Store, disk: Disk, name: str, batches: int, seed: int) -> list[float]:
    """Milliseconds of each batch; a file that is small enough comes from memory once all of it was read."""
    rows = shuffled(store, READ_BATCH, seed)
    if name == DISK:
        forget(store)
        return _each(lambda: disk.read(next(rows)), batches)
    if name == FROM_DISK:
        forget(store)
    else:  # the same rows once before
        warm = shuffled(store, READ_BATCH, seed)
        for _ in range(batches + 8):
            store.read(next(warm))
    with closing(make_ahead(store.read, rows)) as ahead:
        return _each(lambda: next(ahead), batches)


def _each(read: Callable[[], object], batches: int) -> list[float]:
    found = []
    for _ in range(batches):
        start = time.perf_counter()
        read()
        found.append((time.perf_counter() - start) * 1e3)
    mean = sum(found) / len(found)
    # What is read ahead comes in bursts, so that only the mean says how fast it comes.
    return [mean] * len(found)


def median(rows: list[Row], candidate: str) -> float | None:
    """Milliseconds of a candidate, of the rows of one group."""
    return next((row.timing.median for row in rows if row.candidate == candidate and row.timing is not None), None)


def speedup(rows: list[Row], peer: str) -> float | None:
    """The peer's time in multiples of the step's from a store."""
    theirs, own = median(rows, peer), median(rows, STORED)
    return None if theirs is None or own is None else theirs / own


def factors_per_second(row: Row) -> float | None:
    """Of a row that reads."""
    return None if row.timing is None or row.work != READ else row.details["factors"] / row.timing.median * 1e3


def _lines(rows: list[Row], device: str) -> Iterator[tuple[str, ...]]:
    """Candidate, milliseconds, rate, against the step from a store, and what is aimed at."""
    for row in rows:
        if row.timing is None:
            yield row.candidate, row.reason, "", "", ""
            continue
        time_ms, rate = tables.number(row.timing.median, " ms"), factors_per_second(row)
        if row.work == READ:
            share, own = "", median(rows, STORED)
            if own is not None:
                share = f"{row.timing.median / own:.1%} of the step"
            aim = f"{MOST_READING:.0%}" if own is not None else f"{READER_TARGET:,} factors/s"
            yield row.candidate, time_ms, f"{rate:,.0f} factors/s", share, aim if row.candidate != DISK else ""
            continue
        target = TARGETS.get((device, row.candidate))
        images = f"{row.details['dims'][0] / row.timing.median * 1e3:,.0f} images/s"
        ratio = tables.number(speedup(rows, row.candidate), "x")
        is_aimed = target is not None and (device == "cpu") == (row.details["dims"][2] == CIFAR.size)
        yield row.candidate, time_ms, images, ratio, f"{target:g}x" if is_aimed else ""


HEADINGS = ("candidate", "time", "rate", f"time / {STORED}", "aimed at")


def _by_group(rows: list[Row]) -> Iterator[tuple[str, list[Row]]]:
    for name in dict.fromkeys(row.group for row in rows):
        yield name, [row for row in rows if row.group == name]


def show(rows: list[Row]) -> Iterator[Table]:
    """One table for each group."""
    device = next((row.details["device"] for row in rows if "device" in row.details), "cpu")
    for name, members in _by_group(rows):
        table = Table(title=name, title_justify="left", title_style="bold")
        for place, heading in enumerate(HEADINGS):
            table.add_column(heading, justify="right" if place else "left")
        for line in _lines(members, device):
            table.add_row(*line)
        yield table


def markdown(newest: dict[str, tuple[str, Record]], brief: bool = False) -> str:
    """The block of the README and of docs/benchmarks.md."""

    def found_in(_: str, record: Record) -> tuple[str, list[str]]:
        device = "cuda" if "gpu" in record.hardware else "cpu"
        shown = []
        for name, members in _by_group(record.of(STEM)):
            shown += [f"{name}:", tables.markdown_table(HEADINGS, list(_lines(members, device)), numbers_from=1)]
        return ". Medians", shown

    return tables.by_device(newest, found_in, brief)


BENCH = Bench(
    summary="steps from a factor store against a live teacher's, and the store's reader by itself",
    size=size,
    run=run,
    tables=show,
    markdown=markdown,
)
