"""``python -m bench guard``: the command; bench/guard/regression.py measures and judges."""

import argparse
import json
import math
import sys
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from bench.arguments import positive
from bench.guard import regression
from bench.guard.regression import MARGIN, GuardError
from bench.harness import machine, records
from bench.harness.records import Record, RecordError, load, other_device
from bench.harness.running import prepare
from bench.results.tables import number


def margin_number(text: str) -> float:
    """An argparse type: a finite number of at least 1."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 1 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least 1.")
    return value


def show(verdict: regression.Verdict, console: Console) -> None:
    """A table of the checks, or what is wrong and no figure."""
    for note in verdict.notes:
        console.print(note, highlight=False, markup=False)
    if verdict.wrong:
        for reason in verdict.wrong:
            console.print(reason, style="red", highlight=False, markup=False)
        return
    table = Table(title="time of ftfast in multiples of the peer's", title_justify="left")
    for heading in ("group", "work", "candidate", "peer"):
        table.add_column(heading)
    for heading in ("ratio", "recorded", "at most", "attempts"):
        table.add_column(heading, justify="right", no_wrap=True)
    for check in verdict.checks:
        figures = (number(check.found), number(check.recorded), number(check.limit), str(check.attempts))
        ratio = check.ratio
        table.add_row(
            ratio.group, ratio.work, ratio.candidate, ratio.peer, *figures, style="" if check.passed else "red"
        )
    console.print(table)
    failed = sum(not check.passed for check in verdict.checks)
    console.print(
        f"{len(verdict.checks) - failed} of {len(verdict.checks)} ratios within their limits", highlight=False
    )


def main(arguments: list[str]) -> int:
    """Returns 0, 1 where a ratio is past its limit or a candidate wrong, or exits with 2 where nothing can be said."""
    parser = argparse.ArgumentParser(
        prog="python -m bench guard",
        description="Measure a few cases again, and fail where ftfast over yardstick F, or over the eager formula, is "
        "past a margin of the committed record's ratio, or slower than the eager formula. Where no record is of this "
        "device, only the latter is checked. A candidate that is wrong fails, without any figure.",
    )
    parser.add_argument("record", nargs="?", type=Path, metavar="RECORD", help="default: the newest of this device")
    parser.add_argument("--records", type=Path, default=records.RECORDS, help="where to look, default: bench/records")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: cuda where it is")
    parser.add_argument("--threads", type=positive, help="torch's threads, default: the cores that may be used")
    parser.add_argument(
        "--margin",
        type=margin_number,
        default=MARGIN,
        help=f"default: {MARGIN:g} times the ratio",
    )
    parser.add_argument("--json", action="store_true", help="print the verdict as JSON, and no table")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device is cuda and torch finds no CUDA device; take cpu or auto.")
    name = options.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    prepare(options.threads)
    works = regression.cases(torch.device(name))
    named = options.record is not None
    try:
        paths = [options.record] if named else sorted(options.records.glob("*.json"))
        candidates = {str(path): load(path) for path in paths}
        if named:
            record = candidates[str(options.record)]
            if reason := other_device(record, nothing_measured(works[0].settings.device)):
                raise GuardError(f"{options.record} is of another device class: {reason}")
            works = [work for work in works if record.of(work.name)]
            if not works:
                raise GuardError(f"{options.record} has no case of the guard; name a record of ft_loss or ft_head.")
        verdict = regression.judge(works, candidates, named=named, margin=options.margin)
    except (OSError, UnicodeDecodeError, RecordError, GuardError) as error:
        parser.error(str(error))
    if options.json:
        checks = [check.to_dict() for check in verdict.checks]
        found = {"passed": verdict.passed, "margin": options.margin, "notes": verdict.notes, "wrong": verdict.wrong}
        print(json.dumps({**found, "checks": checks}, indent=1, allow_nan=False))
    else:
        show(verdict, Console(width=None if sys.stdout.isatty() else 160))
    return 0 if verdict.passed else 1


def nothing_measured(device: torch.device) -> Record:
    """What a record made here would say of the machine."""
    return Record("", machine.hardware(device), {}, {"threads": torch.get_num_threads()}, [])
