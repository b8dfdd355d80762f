"""A whole distillation step, ResNet-56 to ResNet-20 on 32x32 images: ``ftfast distill``'s own against its peers."""

from collections.abc import Callable, Iterator

from rich.table import Table

from bench import gate, tables
from bench.candidates import Candidate, Group
from bench.clocks import clock_for
from bench.measuring import measure_group, raised
from bench.records import Record, Row
from bench.registry import Bench, Settings
from bench.step_peers import STUDENT, TEACHER, Operands, Step, StepJudge, hand_tuned, official, ours
from bench.step_torchdistill import torchdistill

STEM = "distill_step"
WORK = "step"
OURS = "ftfast"
OFFICIAL = "official"
TORCHDISTILL = "torchdistill"
HAND_TUNED = "eager, hand-tuned"
NO_TEACHER = "no teacher"
BATCH, QUICK_BATCH = 128, 16
# How many times faster ours has to be, on a quiet machine.
TARGETS = {OFFICIAL: 5.0, TORCHDISTILL: 2.8, HAND_TUNED: 1.25}
WAYS: dict[str, Callable[[Operands], Step]] = {
    OFFICIAL: official,
    TORCHDISTILL: torchdistill,
    HAND_TUNED: hand_tuned,
    OURS: lambda with_: ours(with_, "ft"),
    NO_TEACHER: lambda with_: ours(with_, "none"),
}
FLOAT32 = (OFFICIAL, TORCHDISTILL)


def group_name(batch: int) -> str:
    """The name of the table."""
    return f"{TEACHER} to {STUDENT}, {batch}x3x32x32, SGD, synthetic images"


def _group(settings: Settings) -> Group:
    batch = QUICK_BATCH if settings.quick else BATCH
    details = {"teacher": TEACHER, "student": STUDENT, "dims": [batch, 3, 32, 32]}
    return Group(STEM, group_name(batch), details, lambda: candidates(settings, batch))


def candidates(settings: Settings, batch: int) -> list[Candidate]:
    """The ways to do the step; one that cannot be built raises when its turn comes."""
    with_ = Operands(batch, settings.device, settings.plan.seed)
    judge = StepJudge(with_)
    return [_candidate(name, way, with_, judge) for name, way in WAYS.items()]


def _candidate(name: str, way: Callable[[Operands], Step], with_: Operands, judge: StepJudge) -> Candidate:
    try:
        step = way(with_)
    except Exception as error:
        failure = RuntimeError(raised(error))

        def fail() -> None:
            raise failure

        return Candidate(name, WORK, fail)
    computes = "float32 NCHW" if name in FLOAT32 else "bfloat16 autocast, channels_last"

    def verdict() -> gate.Errors:
        return judge(step, is_float32=name in FLOAT32)

    return Candidate(
        name,
        WORK,
        step.run,
        gate=None if name == NO_TEACHER else verdict,  # another loss: there is nothing to compare it with
        details={"computes": computes, "teacher_done": step.note},
    )


def size(settings: Settings) -> int:
    """How often :func:`run` reports progress."""
    return len(WAYS) * (1 + settings.plan.blocks)


def run(settings: Settings, advance: Callable[[str], None]) -> list[Row]:
    """Measure every way."""
    return measure_group(_group(settings), clock_for(settings.device), settings.plan, advance)


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
            timing, target = row.timing, TARGETS.get(row.candidate)
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


def markdown(newest: dict[str, tuple[str, Record]]) -> str:
    """The README's block."""
    blocks = []
    for device, title in (("cpu", "CPU"), ("cuda", "CUDA GPU")):
        if device not in newest:
            blocks.append(f"{title}: {tables.NOT_MEASURED}.")
            continue
        _, record = newest[device]
        rows = [row for row in record.of(STEM) if row.group == group_name(BATCH)]
        lines = []
        for row in rows:
            ratio = speedup(rows, row.candidate)
            time = row.reason if row.timing is None else tables.number(row.timing.median, " ms")
            computes = row.details.get("computes", "")
            lines.append((row.candidate, computes, time, "" if ratio is None else tables.number(ratio)))
        notes = "".join(f" Note: {note}." for note in record.notes)
        blocks.append(f"{title}: {tables.provenance(record)}. Medians of whole steps, {group_name(BATCH)}.{notes}")
        blocks.append(tables.markdown_table((WORK, "computes", "time", f"time / {OURS}"), lines, numbers_from=2))
    return "\n\n".join(blocks)


BENCH = Bench(
    summary="a whole distillation step against the official way, torchdistill and hand-tuned eager",
    size=size,
    run=run,
    tables=show,
    markdown=markdown,
)
