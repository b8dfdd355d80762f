"""How time grows: the loss over samples, channels and map size, and the head over samples."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from rich.table import Table

import ftfast
from bench import peers
from bench.harness.gate import FORWARD_BACKWARD, Candidate, Group
from bench.harness.measuring import Plan, measure_groups
from bench.harness.records import Record, Row
from bench.harness.registry import Bench, Settings
from bench.kernels import ft_head
from bench.kernels.ceilings import copy_candidate, matmul_candidate, yardstick_candidate
from bench.kernels.layers import fastest_library
from bench.kernels.loss_cases import FORMULA, LossCases
from bench.results import curves, tables
from bench.results.throughput import MATMUL
from bench.shapes import FactorShape
from ftfast.commands.tune.heads import HeadShape

STEM = "scaling"
OURS = "ftfast"
SHOWN = (OURS, peers.EAGER, peers.YARDSTICK)
BY_SAMPLES, BY_CHANNELS, BY_MAP = "N: samples", "C: channels", "H = W: map size"
HEAD_BY_SAMPLES = "N: samples of a head"
BLOCK_SECONDS = 0.05
MATMUL_SIZE = {"cpu": 1024, "cuda": 8192}
# By device: the factor that the others are varied from, and each sweep's values.
BASE = {"cpu": FactorShape("", 64, 32, 8, 8), "cuda": FactorShape("", 256, 256, 7, 7)}
HEAD_BASE = {"cpu": HeadShape("", 64, 64, 64, 32, 8, 8), "cuda": HeadShape("", 256, 256, 256, 128, 7, 7)}
VALUES = {
    "cpu": {
        BY_SAMPLES: (16, 32, 64, 128, 256, 512, 1024),
        BY_CHANNELS: (8, 16, 32, 64, 128, 256, 512),
        BY_MAP: (2, 4, 8, 16, 32),
        HEAD_BY_SAMPLES: (4, 8, 16, 32, 64, 128),
    },
    "cuda": {
        BY_SAMPLES: (16, 32, 64, 128, 256, 512, 1024, 2048, 4096),
        BY_CHANNELS: (16, 32, 64, 128, 256, 512, 1024, 2048),
        BY_MAP: (4, 7, 14, 28, 56),
        HEAD_BY_SAMPLES: (16, 32, 64, 128, 256, 512, 1024),
    },
}


def plan_of(settings: Settings) -> Plan:
    """A shorter one: many points stand for each other."""
    plan = settings.plan
    calls = 3 if settings.quick else 5
    return replace(
        plan,
        blocks=min(plan.blocks, 3),
        warmups=min(plan.warmups, 2),
        calls=min(plan.calls, calls),
        block_seconds=min(plan.block_seconds, BLOCK_SECONDS),
        energy_seconds=0.0,
    )


def varied(sweep: str, value: int, device: str) -> FactorShape:
    """The factor at one point of a sweep of the loss."""
    base = BASE[device]
    if sweep == BY_SAMPLES:
        return base._replace(samples=value)
    if sweep == BY_CHANNELS:
        return base._replace(channels=value)
    return base._replace(height=value, width=value)


def values(settings: Settings, sweep: str) -> tuple[int, ...]:
    """A quick look takes every second value."""
    found = VALUES[settings.device.type][sweep]
    return found[::2] if settings.quick else found


def groups(settings: Settings) -> Iterator[Group]:
    """One group for each point; the first of the chosen dtypes and layouts is swept."""
    dtype = (settings.dtypes or (torch.float32,))[0]
    head_dtype = (settings.head_dtypes or (torch.bfloat16,))[0]
    layout = (settings.layouts or ("nchw",))[0]
    device = settings.device.type
    for sweep in (BY_SAMPLES, BY_CHANNELS, BY_MAP):
        for value in values(settings, sweep):
            shape = varied(sweep, value, device)
            elements = shape.numel // shape.samples
            details = {
                **_where(sweep, value, shape.samples, dtype),
                "dims": list(shape.dims),
                "layout": layout,
                "elements": elements,
                "work_of_a_sample": elements,
                "ceiling": peers.COPY,
            }
            name = f"{sweep}, {value}: {shape}, {_name(dtype)}, {layout}"
            yield Group(STEM, name, details, partial(loss_candidates, settings, shape, dtype, layout))
    for value in values(settings, HEAD_BY_SAMPLES):
        head = HEAD_BASE[device]._replace(samples=value)
        details = {
            **_where(HEAD_BY_SAMPLES, value, value, head_dtype),
            "dims": list(head[1:]),
            "layout": "channels_last",
            "work_of_a_sample": ft_head.flops(head, FORWARD_BACKWARD) // value,
            "ceiling": MATMUL,
        }
        name = f"{HEAD_BY_SAMPLES}, {value}: {head}, {_name(head_dtype)}"
        yield Group(STEM, name, details, partial(head_candidates, settings, head, head_dtype))


def _where(sweep: str, value: int, samples: int, dtype: torch.dtype) -> dict[str, Any]:
    return {"sweep": sweep, "value": value, "samples": samples, "dtype": _name(dtype)}


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def loss_candidates(settings: Settings, shape: FactorShape, dtype: torch.dtype, layout: str) -> list[Candidate]:
    """Ours, the official formula, yardstick F and a copy."""
    cases = LossCases(shape, dtype, layout, settings.device, settings.plan.seed)
    works = (FORWARD_BACKWARD,)
    return [
        *cases.entries(peers.EAGER, peers.official_formula, works=works, rounds_throughout=True),
        *cases.entries(OURS, ftfast.FTLoss(), works=works),
        yardstick_candidate(cases.student, cases.teacher),
        copy_candidate(cases.teacher),
    ]


def head_candidates(settings: Settings, head: HeadShape, dtype: torch.dtype) -> list[Candidate]:
    """Ours, the official code's way, and a matmul."""
    with_eager = replace(settings, peers=("eager",), quick=True)
    found = [
        candidate
        for candidate in ft_head.candidates(with_eager, head, dtype)
        if candidate.work == FORWARD_BACKWARD and candidate.name in SHOWN
    ]
    return [*found, matmul_candidate(MATMUL_SIZE[settings.device.type], dtype, settings.device)]


def size(settings: Settings) -> int:
    """How often :func:`run` reports progress."""
    of_loss = sum(len(values(settings, sweep)) for sweep in (BY_SAMPLES, BY_CHANNELS, BY_MAP))
    return (4 * of_loss + 3 * len(values(settings, HEAD_BY_SAMPLES))) * (1 + plan_of(settings).blocks)


def run(settings: Settings, advance: Callable[[str], None]) -> list[Row]:
    """Measure every point."""
    with fastest_library():
        return measure_groups(groups(settings), settings.device, plan_of(settings), advance)


def _lines(points: dict[str, list[curves.Point]]) -> Iterator[list[str]]:
    """Value, each candidate's time, eager over ours, and ours in percent of the ceiling."""
    by_value = {name: {point.value: point for point in points[name]} for name in SHOWN if name in points}
    for value in sorted({value for found in by_value.values() for value in found}):
        at = [found.get(value) for found in by_value.values()]
        ours, eager = (by_value.get(name, {}).get(value) for name in (OURS, peers.EAGER))
        ratio = None
        if ours and eager and ours.microseconds and eager.microseconds:
            ratio = eager.microseconds / ours.microseconds
        times = [tables.number(None if point is None else point.microseconds) for point in at]
        yield [str(value), *times, tables.number(ratio), tables.number(ours.percent if ours else None)]


def headings(sweep: str, points: dict[str, list[curves.Point]]) -> tuple[str, ...]:
    """Of a sweep's table."""
    times = [f"{name}, µs a sample" for name in SHOWN if name in points]
    return (sweep, *times, f"{peers.EAGER} / {OURS}", f"{OURS}, % of ceiling")


def show(rows: list[Row]) -> Iterator[Table]:
    """One table for each sweep; why a point has no figure stands below it."""
    for sweep, points in curves.sweeps(rows).items():
        table = Table(title=f"time per sample along {sweep}", title_justify="left", title_style="bold")
        for heading in headings(sweep, points):
            table.add_column(heading, justify="right")
        for line in _lines(points):
            table.add_row(*line)
        yield table
    for row in rows:
        if row.reason:
            yield Table(title=f"{row.group}, {row.candidate}: {row.reason}", title_justify="left", title_style="red")


def markdown(newest: dict[str, tuple[str, Record]], brief: bool = False) -> str:
    """The block of the README and of docs/benchmarks.md."""

    def found_in(picture: str, record: Record) -> tuple[str, list[str]]:
        shown = [f"![Time per sample and percent of the ceiling over N, C and map size]({picture})"]
        for sweep, points in curves.sweeps(record.of(STEM)).items():
            shown.append(tables.markdown_table(headings(sweep, points), list(_lines(points)), numbers_from=1))
        return ". Medians of forward and backward", shown

    return tables.by_device(newest, found_in, brief)


BENCH = Bench(
    summary="time per sample of the loss over N, C and map size, and of the head over N",
    size=size,
    run=run,
    tables=show,
    markdown=markdown,
    formula=f"of the loss: {FORMULA}. Of the head: {ft_head.FORMULA}",
)
