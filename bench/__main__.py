"""``python -m bench``: the run, and what it prints."""

import argparse
import os
import shlex
import sys
from datetime import UTC, datetime
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from bench import machine, plots, quiet, readme
from bench.arguments import build_parser, check_out, settings_from
from bench.records import Record, RecordError, load, save
from bench.registry import Bench, Settings, discover


def measure(chosen: dict[str, Bench], settings: Settings, arguments: list[str], quick: bool) -> Record:
    """Run benches and put what they found into a record."""
    hardware = machine.hardware(settings.device)
    notes = [note] if (note := quiet.busy_note()) else []
    if quick:
        notes.append("--quick: few calls, not to be quoted")
    for note in notes:
        print(f"python -m bench: {note}.", file=sys.stderr)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    errors = Console(stderr=True)
    others = quiet.Others()
    rows = []
    with Progress(
        *columns, console=errors, disable=not (errors.is_terminal and sys.stderr.isatty()), transient=True
    ) as progress:
        for bench in chosen.values():
            task = progress.add_task("", total=bench.size(settings))

            def advance(what: str, task: TaskID = task) -> None:
                progress.update(task, advance=1, description=what)

            rows += bench.run(settings, advance)
    if note := others.note():
        notes.append(note)
        print(f"python -m bench: {note}.", file=sys.stderr)
    return Record(
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        hardware={**hardware, "cores_used_by_others": others.cores()},
        software=machine.software(),
        settings={
            "command": shlex.join(["python", "-m", "bench", *arguments]),
            "threads": torch.get_num_threads(),
            "interop_threads": torch.get_num_interop_threads(),
            "blocks": settings.plan.blocks,
            "warmups_per_block": settings.plan.warmups,
            "fewest_calls_per_block": settings.plan.calls,
            "block_seconds": settings.plan.block_seconds,
            "seed": settings.plan.seed,
        },
        rows=rows,
        notes=notes,
        formulas={name: bench.formula for name, bench in chosen.items() if bench.formula},
    )


def plot_main(arguments: list[str]) -> int:
    """``python -m bench plot``."""
    parser = argparse.ArgumentParser(
        prog="python -m bench plot", description="Draw bench records, as SVG and PNG beside each, from nothing else."
    )
    parser.add_argument("records", nargs="+", type=Path, metavar="RECORD")
    for path in parser.parse_args(arguments).records:
        try:
            record = load(path)
            for name in dict.fromkeys(row.bench for row in record.rows):
                for picture in plots.plot(record, name, path):
                    print(picture)
        except (OSError, RecordError, UnicodeDecodeError) as error:
            parser.error(str(error))
    return 0


def main(arguments: list[str]) -> int:
    """Returns 0, 1 where a candidate has no figure, or exits with 2 for bad input."""
    if arguments[:1] == ["readme"]:
        return readme.main(arguments[1:])
    if arguments[:1] == ["plot"]:
        return plot_main(arguments[1:])
    benches = discover()
    parser = build_parser(benches)
    options = parser.parse_args(arguments)
    # Off a terminal rich takes 80 columns, into which the tables do not fit.
    console = Console(width=None if sys.stdout.isatty() else 140)
    if options.list:
        for name, bench in benches.items():
            console.print(f"{name:<12} {bench.summary}", highlight=False)
        return 0
    for name in options.what:
        if name not in benches:
            parser.error(f"WHAT is {name!r}; take of {', '.join(benches)}.")
    settings = settings_from(options, parser)
    if options.out is not None and (problem := check_out(options.out, options.overwrite)):
        parser.error(problem)
    torch.set_num_threads(options.threads or quiet.usable_cores())
    # Idle compile workers would share the cores with what is measured.
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
    chosen = {}
    for name in dict.fromkeys(options.what or benches):
        if not (refusal := benches[name].refuses(settings)):
            chosen[name] = benches[name]
        elif options.what:
            parser.error(refusal)
        else:
            print(f"python -m bench: {refusal}", file=sys.stderr)
    record = measure(chosen, settings, arguments, options.quick)
    if options.out is not None:
        save(record, options.out)
    if options.json:
        print(record.to_json(), end="")
    else:
        for name, bench in chosen.items():
            for table in bench.tables(record.of(name)):
                console.print(table)
    return 1 if any(row.reason for row in record.rows) else 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
