"""What ``python -m bench guard`` measures, and what it may find.

Ratios to yardstick F and to the eager formula, never times: both sides of a ratio are measured here and now, so that a
slow or busy machine slows both. A candidate's time is that of its quietest block in all attempts, which what else runs
on the machine disturbs least; a case that fails is measured again, alone, before it counts. Against eager there is a
bound that holds on every machine, with or without a record of it.
"""

import time
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from bench.harness.measuring import Plan
from bench.harness.records import Record, Timing, comparable
from bench.harness.registry import Settings
from bench.harness.running import Work, measure
from bench.kernels import ft_head, ft_loss
from bench.peers import EAGER, YARDSTICK
from bench.results.compare import Ratio, ratios, times
from bench.shapes import SHAPES, head_on
from ftfast.commands.tune.heads import HEADS

MARGIN = 1.5
ATTEMPTS = 3
# No further attempt is begun after this.
SECONDS = 120.0
PLAN = Plan(blocks=5, warmups=2, calls=5, block_seconds=0.1, energy_seconds=0.0, most_calls=60)
PEERS = (YARDSTICK, EAGER)
# Eager takes tens of milliseconds on the larger one.
LOSSES = {"cifar-r56-r20": ("nchw", "channels_last"), "imagenet-r34-r18": ("channels_last",)}
# The most that a ratio to a peer may be anywhere. The loss's own work is a small part of eager's; a head is its
# convolutions mostly, which may be the same library's, so that noise decides there.
BOUNDS = {(ft_loss.STEM, EAGER): 1.0, (ft_head.STEM, EAGER): 1.15}


class GuardError(ValueError):
    """Nothing can be said; the message says why."""


@dataclass(frozen=True)
class Check:
    """A ratio, what the record has for it, and the most that it may be.

    Attributes:
        limit: the lower of the record's ratio times the margin and the bound that holds everywhere.
        attempts: how often the case was measured.
    """

    ratio: Ratio
    found: float
    recorded: float | None
    limit: float
    attempts: int

    @property
    def passed(self) -> bool:
        return self.found <= self.limit

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        rest = {"ratio": self.found, "recorded": self.recorded, "limit": self.limit}
        return {**self.ratio._asdict(), **rest, "attempts": self.attempts, "passed": self.passed}


def cases(device: torch.device) -> list[Work]:
    """What is measured, a group each: the loss of two pairs in both dtypes, and a small head."""

    def settings(**chosen: Any) -> Settings:
        nothing: dict[str, Any] = {"dtypes": (), "shapes": (), "layouts": ()}
        return Settings(device=device, peers=("eager",), plan=PLAN, **{**nothing, **chosen})

    of_loss = [
        Work(ft_loss.STEM, ft_loss.BENCH, settings(dtypes=(dtype,), shapes=(SHAPES[pair],), layouts=(layout,)))
        for pair, layouts in LOSSES.items()
        for dtype in (torch.float32, torch.bfloat16)
        for layout in layouts
    ]
    head = head_on(HEADS["cifar-r56-r20"], device.type)
    return [*of_loss, Work(ft_head.STEM, ft_head.BENCH, settings(heads=(head,), head_dtypes=(torch.bfloat16,)))]


def quietest(timing: Timing) -> float:
    """The median of the block that was disturbed least."""
    return min(timing.block_medians)


class Attempts:
    """The quietest times of all attempts at one case."""

    def __init__(self, work: Work, first: Record) -> None:
        self.work = work
        self.count = 0
        self.found: dict[tuple[str, str, str, str], float] = {}
        self.add(first)

    def add(self, record: Record) -> None:
        """Take in the rows of another attempt."""
        self.count += 1
        for key, milliseconds in times(record, quietest).items():
            self.found[key] = min(milliseconds, self.found.get(key, milliseconds))

    def checks(self, recorded: dict[Ratio, float], margin: float) -> list[Check]:
        """Every ratio that a record or a bound limits."""
        held = []
        for ratio, found in ratios(self.found).items():
            bound = BOUNDS.get((ratio.bench, ratio.peer))
            before = recorded.get(ratio)
            limits = [limit for limit in (bound, None if before is None else before * margin) if limit is not None]
            if ratio.peer in PEERS and limits:
                held.append(Check(ratio, found, before, min(limits), self.count))
        return held


class Verdict(NamedTuple):
    """What the guard found.

    Attributes:
        wrong: why candidates have no figure; there are no checks then.
        notes: what was not checked, and why.
    """

    checks: list[Check]
    wrong: list[str]
    notes: list[str]

    @property
    def passed(self) -> bool:
        return bool(self.checks) and not self.wrong and all(check.passed for check in self.checks)


def recorded_ratios(here: Record, candidates: dict[str, Record], named: bool) -> tuple[dict[Ratio, float], list[str]]:
    """The ratios that each bench has in the newest record that can be compared, and what is to be said of the others.

    Args:
        here: what was measured now.
        candidates: records by what names them.
        named: whether the command line named the record, so that there is no way around it.

    Raises:
        GuardError: the named record cannot be compared.
    """
    found: dict[Ratio, float] = {}
    notes = []
    newest_first = sorted(candidates.items(), key=lambda candidate: candidate[1].created, reverse=True)
    for bench in dict.fromkeys(row.bench for row in here.rows):
        reasons = []
        for name, record in newest_first:
            # Groups that only one of them has are neither's fault.
            shared = {(row.bench, row.group) for row in here.of(bench)} & {
                (row.bench, row.group) for row in record.rows
            }
            if not shared:
                continue
            if reason := comparable(record.only(shared), here.only(shared)):
                reasons.append(f"{name}: {reason}")
                continue
            found |= ratios(times(record.only(shared), quietest))
            break
        else:
            why = " ".join(reasons) or "No record has its cases."
            if named:
                raise GuardError(f"{bench} cannot be held against the record. {why}")
            notes.append(f"{bench} is held against the bounds alone that hold on every machine. {why}")
    return found, notes


def without_figure(record: Record) -> list[str]:
    """Candidates that raise or are wrong."""
    return [f"{row.group}: {row.candidate}, {row.work}: {row.reason}" for row in record.rows if row.timing is None]


def judge(works: list[Work], candidates: dict[str, Record], *, named: bool = False, margin: float = MARGIN) -> Verdict:
    """Measure the cases, and those that fail again.

    Args:
        works: cases, of one group each.
        candidates, named: see :func:`recorded_ratios`.
        margin: how many times the recorded ratio a ratio may be.

    Raises:
        GuardError: see :func:`recorded_ratios`.
    """
    begin = time.monotonic()
    device = works[0].settings.device
    here = measure(works, device, ["guard"])
    if wrong := without_figure(here):
        return Verdict([], wrong, [])
    recorded, notes = recorded_ratios(here, candidates, named)
    groups = dict.fromkeys((row.bench, row.group) for row in here.rows)  # In the order of the works.
    attempts = [Attempts(work, here.only({group})) for work, group in zip(works, groups, strict=True)]
    for _ in range(ATTEMPTS - 1):
        for case in attempts:
            fails = not all(check.passed for check in case.checks(recorded, margin))
            if fails and time.monotonic() - begin < SECONDS:
                again = measure([case.work], device, ["guard"])
                if wrong := without_figure(again):
                    return Verdict([], wrong, [])
                case.add(again)
    return Verdict([check for case in attempts for check in case.checks(recorded, margin)], [], notes)
