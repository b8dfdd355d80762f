"""A run: benches measured one after another, and what they were measured on, as a record."""

import logging
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import NamedTuple

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from bench.harness import machine, power
from bench.harness.clocks import own_stream
from bench.harness.measuring import Plan
from bench.harness.records import Record
from bench.harness.registry import Bench, Settings
from ftfast.distillation.monitor import gpu_meter
from ftfast.distillation.monitor.processor_time import usable_cores


class Work(NamedTuple):
    """A bench, by its name, and what it is to measure."""

    name: str
    bench: Bench
    settings: Settings


def prepare(threads: int | None) -> None:
    """Set torch's threads, None for all cores, and keep torch.compile from starting processes that stay."""
    torch.set_num_threads(threads or usable_cores())
    # Idle compile workers would share the cores with what is measured.
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
    # torch.compile warns of an nvcc without a GPU, which is no news where the CPU is measured.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)


def begun(device: torch.device, plan: Plan, arguments: Sequence[str], notes: Sequence[str] = ()) -> Record:
    """A record without rows: the machine, and how it is measured there."""
    return Record(
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        hardware=machine.hardware(device),
        software=machine.software(),
        settings={
            "command": shlex.join(["python", "-m", "bench", *arguments]),
            "threads": torch.get_num_threads(),
            "interop_threads": torch.get_num_interop_threads(),
            "blocks": plan.blocks,
            "warmups_per_block": plan.warmups,
            "fewest_calls_per_block": plan.calls,
            "block_seconds": plan.block_seconds,
            "energy_seconds": plan.energy_seconds,
            "seed": plan.seed,
        },
        rows=[],
        notes=list(notes),
    )


def measure(works: Sequence[Work], device: torch.device, arguments: Sequence[str], notes: Sequence[str] = ()) -> Record:
    """Measure, with a bar on a terminal; notes of a busy machine are kept and, unless it is quick, printed to stderr.

    Args:
        works: at least one, and all of one plan.
        device: on which they measure.
        arguments: of the command line, for the record.
        notes: further ones for the record.
    """
    kept = [note for note in (machine.busy_note(), *notes) if note]
    record = begun(device, works[0].settings.plan, arguments, kept)
    is_quick = works[0].settings.quick  # not to be quoted in any case
    for note in notes if is_quick else kept:
        print(f"python -m bench: {note}.", file=sys.stderr)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    errors = Console(stderr=True)
    silent = not (errors.is_terminal and sys.stderr.isatty())
    others = machine.Others()
    threads = torch.get_num_threads()
    rows = []
    with (
        Progress(*columns, console=errors, disable=silent, transient=True) as bar,
        power.Watch(gpu_meter.gpu_of(device)) as watch,
        # A GPU's kernels are launched by one thread, which is better left where the scheduler has it.
        machine.pinned(threads if device.type == "cpu" else usable_cores()) as cores,
        own_stream(device),
    ):
        task = bar.add_task("", total=sum(work.bench.size(work.settings) for work in works))
        for work in works:
            rows += work.bench.run(work.settings, lambda what: bar.update(task, advance=1, description=what))
    if note := others.note():
        kept.append(note)
        if not is_quick:
            print(f"python -m bench: {note}.", file=sys.stderr)
    if during := watch.summary():
        record.hardware["gpu"]["run"] = during
    return replace(
        record,
        hardware={**record.hardware, "cores_used_by_others": others.cores()},
        settings={**record.settings, "cores": cores},
        rows=rows,
        notes=kept,
        formulas={work.name: work.bench.formula for work in works if work.bench.formula},
    )
