"""Timing: every candidate in blocks of its own, blocks in random order, nothing but the step on the clock."""

import gc
import math
import random
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch

from bench.harness.clocks import Clock, clock_for
from bench.harness.gate import BACKWARD, Candidate, Errors, Gate, Group
from bench.harness.records import Row, Timing


@dataclass(frozen=True)
class Plan:
    """How long to measure.

    Attributes:
        blocks: blocks of each candidate.
        warmups: untimed calls at the start of a block.
        calls: the fewest timed calls in a block.
        block_seconds: a fast candidate is called more often than ``calls``, until its block takes this long.
        seed: of the order of blocks and of the factors.
        most_calls: the most in a block, which else takes seconds once a busy machine makes slow what was fast.
        energy_seconds: on a GPU, how long a candidate runs back to back for its energy; 0 leaves it out.
        known: called with every row of a group as soon as it is known.
        rehearsed: what is wrong is timed too, where all that is computed is worthless and only the way is tried.
    """

    blocks: int = 5
    warmups: int = 5
    calls: int = 10
    block_seconds: float = 0.25
    seed: int = 0
    energy_seconds: float = 0.3
    most_calls: int = 1000
    known: Callable[[Row], None] = lambda row: None
    rehearsed: bool = False


QUICK_PLAN = Plan(blocks=2, warmups=2, block_seconds=0.0, energy_seconds=0.0)


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    gc.collect()
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def summarise(blocks: Sequence[Sequence[float]]) -> Timing:
    """Median and 20th and 80th percentile over all calls of all blocks."""
    elapsed = sorted(ms for block in blocks for ms in block)
    fifths = statistics.quantiles(elapsed, n=5, method="inclusive")
    return Timing(
        median=statistics.median(elapsed),
        p20=fifths[0],
        p80=fifths[3],
        calls=len(elapsed),
        block_medians=[statistics.median(block) for block in blocks],
    )


def measure_group(group: Group, clock: Clock, plan: Plan, advance: Callable[[str], None] = lambda _: None) -> list[Row]:
    """Gate and time the candidates of a group.

    A candidate that raises or fails its gate gets a row with the reason and without a figure; a group that cannot be
    built, for want of memory say, gets one such row. Candidates of one block are measured one after the other.

    Args:
        advance: called with a candidate's name before its gate and before each of its blocks, ``1 + plan.blocks``
            times each, whatever comes of it.
    """
    try:
        candidates = group.build()
    except Exception as error:  # The other groups are still to be measured.
        found = [Row(group.bench, group.name, "all", "build", None, reason=raised(error), details=dict(group.details))]
        plan.known(found[0])
        return found
    together = [candidates] if plan.blocks > 1 else [[candidate] for candidate in candidates]
    rows = []
    for some in together:
        for row in _measure(group, some, clock, plan, advance):
            plan.known(row)
            rows.append(row)
    return rows


def measure_groups(
    groups: Iterable[Group],
    device: torch.device,
    plan: Plan,
    advance: Callable[[str], None],
    unmeasured: Callable[[Group], Iterable[Row]] = lambda _: (),
) -> list[Row]:
    """The groups one after the other; ``advance`` is told each candidate with its group's name.

    Args:
        unmeasured: further rows of a group, of what cannot be measured here.
    """
    clock, rows = clock_for(device), []
    for group in groups:

        def advance_in_group(candidate: str, name: str = group.name) -> None:
            advance(f"{name}: {candidate}")

        rows += [*measure_group(group, clock, plan, advance_in_group), *unmeasured(group)]
    return rows


def _measure(
    group: Group, candidates: list[Candidate], clock: Clock, plan: Plan, advance: Callable[[str], None]
) -> list[Row]:
    """Candidates whose blocks take turns."""
    verdicts: list[tuple[Gate | Errors | None, str]] = []
    for candidate in candidates:
        advance(candidate.name)
        verdicts.append(_verdict(candidate, plan.rehearsed))
    runnable = [index for index, (_, reason) in enumerate(verdicts) if not reason]
    calls = {index: _calls_per_block(candidates[index], clock, plan) for index in runnable}
    order = [index for index in range(len(candidates)) for _ in range(plan.blocks)]
    random.Random(plan.seed).shuffle(order)
    blocks: dict[int, list[list[float]]] = {index: [] for index in runnable}
    with _no_garbage_collection():
        for index in order:
            advance(candidates[index].name)
            if index in blocks:
                clock.time(candidates[index], plan.warmups)
                blocks[index].append(clock.time(candidates[index], calls[index]))
    timings = {index: summarise(of_candidate) for index, of_candidate in blocks.items()}
    taken = {index: _taken(candidates[index], clock, plan, timing.median) for index, timing in timings.items()}
    rows = []
    for index, candidate in enumerate(candidates):
        gate, reason = verdicts[index]
        rows.append(
            Row(
                bench=group.bench,
                group=group.name,
                candidate=candidate.name,
                work=candidate.work,
                timing=timings.get(index),
                least_bytes=candidate.least_bytes,
                gate=None if gate is None else _finite(asdict(gate)),
                reason=reason,
                details={**group.details, **taken.get(index, {}), **candidate.details},
            )
        )
    return rows


def raised(error: Exception) -> str:
    """Why there is no figure, in words."""
    first_line = str(error).strip().partition("\n")[0]
    return f"it raises {type(error).__name__}: {first_line}"


def _verdict(candidate: Candidate, rehearsed: bool) -> tuple[Gate | Errors | None, str]:
    """The gate's finding and why the candidate is not timed, empty where it is."""
    try:
        gate = candidate.gate() if candidate.gate else None
        candidate.prepare()
        candidate.step()
    except Exception as error:  # A peer that cannot run must not end the others' measurement.
        return None, raised(error)
    if gate is not None and not gate.passed and not rehearsed:
        return gate, f"gate is red: {gate.reason}"
    return gate, ""


def _taken(candidate: Candidate, clock: Clock, plan: Plan, milliseconds: float) -> dict[str, Any]:
    """Memory and energy of a step, off the clock and as far as the device tells them."""
    found: dict[str, Any] = {}
    try:
        if (peak_bytes := clock.peak_bytes(candidate)) is not None:
            found["peak_bytes"] = peak_bytes
        # Back to back, a backward cannot be told from the forward that prepares it.
        seconds = 0.0 if candidate.work == BACKWARD else plan.energy_seconds
        if energy := clock.energy(candidate, milliseconds * 1e-3, seconds):
            found |= {"joules_per_call": energy.joules_per_call, "watts": energy.watts}
    except RuntimeError as error:  # The times are there and stand.
        found["not_taken"] = raised(error)
    return found


def _finite(fields: dict[str, Any]) -> dict[str, Any]:
    """JSON has no nan and no infinity; the gate's reason says them in words."""
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in fields.items()
    }


def _calls_per_block(candidate: Candidate, clock: Clock, plan: Plan) -> int:
    # With its preparation: a backward may be over at once, and need a forward before it.
    begin = time.perf_counter()
    calls = 3
    clock.time(candidate, calls)
    typical = (time.perf_counter() - begin) / calls
    return max(plan.calls, min(plan.most_calls, int(plan.block_seconds / max(typical, 1e-9))))
