"""A whole distillation step, of CIFAR's size and of ImageNet's: ``ftfast distill``'s own against its peers."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache, partial

from rich.table import Table

from bench.harness import gate
from bench.harness.clocks import clock_for
from bench.harness.gate import Candidate, Group
from bench.harness.measuring import Plan, measure_group
from bench.harness.records import Record, Row
from bench.harness.registry import Bench, Settings
from bench.results import tables
from bench.training.step_peers import (
    CIFAR,
    IMAGENET,
    SMALL,
    Operands,
    Pair,
    Step,
    StepJudge,
    hand_tuned,
    official,
    ours,
)
from bench.training.step_torchdistill import torchdistill

STEM = "distill_step"
WORK = "step"
OURS = "ftfast"
OFFICIAL = "official"
TORCHDISTILL = "torchdistill"
HAND_TUNED = "eager, hand-tuned"
NO_TEACHER = "no teacher"
BATCH, QUICK_BATCH = 128, 16
# Images of ImageNet's size in a batch, by device.
LARGE_BATCH = {"cpu": 16, "cuda": 256}
# How many times faster ours has to be, on a quiet machine, with CIFAR's images on a CPU.
TARGETS = {OFFICIAL: 5.0, TORCHDISTILL: 2.8, HAND_TUNED: 1.25}
WAYS: dict[str, Callable[[Operands], Step]] = {
    OFFICIAL: official,
    TORCHDISTILL: torchdistill,
    HAND_TUNED: hand_tuned,
    OURS: lambda with_: ours(with_, "ft"),
    NO_TEACHER: lambda with_: ours(with_, "none"),
}
# On a GPU, where ours is compiled.
EAGER = f"{OURS}, eager"
REPLAYED = {name: f"{name}, CUDA graph" for name in (EAGER, OURS)}
FLOAT32 = (OFFICIAL, TORCHDISTILL)


def group_name(pair: Pair, batch: int) -> str:
    """The name of the table."""
    return f"{pair.title}, {batch}x3x{pair.size}x{pair.size}, SGD, synthetic images"


def cases(settings: Settings) -> list[tuple[Pair, int]]:
    """The pairs that are measured, each with its batch; a quick look has no large images."""
    if settings.quick:
        return [(SMALL, QUICK_BATCH)]
    found = {"cifar": (CIFAR, BATCH), "imagenet": (IMAGENET, LARGE_BATCH[settings.device.type])}
    return [found[name] for name in settings.pairs]


def _group(settings: Settings, pair: Pair, batch: int) -> Group:
    details = {"teacher": pair.teacher, "student": pair.student, "dims": [batch, 3, pair.size, pair.size]}
    return Group(STEM, group_name(pair, batch), details, lambda: candidates(settings, pair, batch))


def _plan(settings: Settings, pair: Pair) -> Plan:
    """Steps on large images take a second each on a CPU."""
    if pair.size <= CIFAR.size or settings.device.type == "cuda":
        return settings.plan
    return replace(settings.plan, blocks=min(3, settings.plan.blocks), warmups=2, calls=3)


def candidates(settings: Settings, pair: Pair, batch: int) -> list[Candidate]:
    """The ways to do the step; one that cannot be built raises when its turn comes."""
    with_ = Operands(pair, batch, settings.device, settings.plan.seed)
    judge = StepJudge(with_)
    found = []
    for name, way in ways(settings).items():
        found.append(_candidate(name, way, with_, judge))
    return found


def ways(settings: Settings) -> dict[str, Callable[[Operands], Step]]:
    """By name; on a GPU ours is there eagerly and as a CUDA graph too; nothing is compiled where that is no peer."""
    if settings.device.type != "cuda":
        return WAYS
    compiled = "compile" in settings.peers
    found = {name: way for name, way in WAYS.items() if name not in (OURS, NO_TEACHER)}
    for name in (EAGER, OURS) if compiled else (EAGER,):
        for replayed in (False, True):
            way = partial(ours, method="ft", compiled=name == OURS, replayed=replayed)
            found[REPLAYED[name] if replayed else name] = way
    return {**found, NO_TEACHER: lambda with_: ours(with_, "none", compiled=compiled)}


def _candidate(name: str, way: Callable[[Operands], Step], with_: Operands, judge: StepJudge) -> Candidate:
    """Built when its turn comes, and raising then where it cannot be."""
    details = {"computes": "float32 NCHW" if name in FLOAT32 else "bfloat16 autocast, channels_last"}

    @cache
    def built() -> Step:
        step = way(with_)
        details["teacher_done"] = step.note
        return step

    @cache
    def verdict() -> gate.Errors:
        return judge(built(), is_float32=name in FLOAT32)

    @cache
    def warmed() -> Step:
        step = built()
        for _ in range(step.warm_ups):
            step.run()
        return step

    # Without a teacher it is another loss: there is nothing to compare it with.
    return Candidate(name, WORK, lambda: warmed().run(), gate=None if name == NO_TEACHER else verdict, details=details)


def size(settings: Settings) -> int:
    """How often :func:`run` reports progress."""
    count = len(ways(settings))
    return sum(count * (1 + _plan(settings, pair).blocks) for pair, _ in cases(settings))


def run(settings: Settings, advance: Callable[[str], None]) -> list[Row]:
    """Measure every way."""
    clock = clock_for(settings.device)
    rows = []
    for pair, batch in cases(settings):
        rows += measure_group(_group(settings, pair, batch), clock, _plan(settings, pair), advance)
    return rows


def speedup(rows: list[Row], peer: str) -> float | None:
    """The peer's time in multiples of ours, of the rows of one group."""
    medians = {row.candidate: row.timing.median for row in rows if row.timing is not None}
    return medians[peer] / medians[OURS] if peer in medians and OURS in medians else None


def show(rows: list[Row]) -> Iterator[Table]:
    """One table for each group; why a row has no figure stands below it."""
    for name in dict.fromkeys(row.group for row in rows):
        members = [row for row in rows if row.group == name]
        table = Table(title=name, title_justify="left", title_style="bold")
        for heading in ("candidate", "computes"):
            table.add_column(heading)
        for heading in ("median ms", "p20-p80 ms", "images/s", f"of {OURS}'s time", "aimed at"):
            table.add_column(heading, justify="right", no_wrap=True)
        missing = []
        for row in members:
            computes = row.details.get("computes", "")
            if row.timing is None:
                table.add_row(row.candidate, computes, "none")
                missing.append(f"{row.candidate}: {row.reason}")
                continue
            is_aimed = row.details["dims"][2] == CIFAR.size
            timing, target = row.timing, TARGETS.get(row.candidate) if is_aimed else None
            table.add_row(
                row.candidate,
                computes,
                tables.number(timing.median),
                f"{tables.number(timing.p20)}-{tables.number(timing.p80)}",
                f"{row.details['dims'][0] / timing.median * 1e3:,.0f}",
                tables.number(speedup(members, row.candidate), "x"),
                "" if target is None else f"{target:g}x",
            )
        if missing:
            table.caption = "\n".join(missing)
        yield table


def markdown(newest: dict[str, tuple[str, Record]], brief: bool = False) -> str:
    """The block of the README and of docs/benchmarks.md."""

    def found_in(_: str, record: Record) -> tuple[str, list[str]]:
        rows = record.of(STEM)
        shown = []
        for name in dict.fromkeys(row.group for row in rows):
            shown += [f"{name}:", _markdown_table([row for row in rows if row.group == name])]
        return ". Medians of whole steps", shown

    return tables.by_device(newest, found_in, brief)


def _markdown_table(rows: list[Row]) -> str:
    lines = []
    for row in rows:
        ratio = speedup(rows, row.candidate)
        time = row.reason if row.timing is None else tables.number(row.timing.median, " ms")
        rate = "" if row.timing is None else f"{row.details['dims'][0] / row.timing.median * 1e3:,.0f}"
        computes = row.details.get("computes", "")
        lines.append((row.candidate, computes, time, rate, "" if ratio is None else tables.number(ratio)))
    return tables.markdown_table((WORK, "computes", "time", "images/s", f"time / {OURS}"), lines, numbers_from=2)


BENCH = Bench(
    summary="a whole distillation step against the official way, torchdistill and hand-tuned eager",
    size=size,
    run=run,
    tables=show,
    markdown=markdown,
)
