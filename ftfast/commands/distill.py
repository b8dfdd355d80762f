"""``ftfast distill``: teacher, paraphraser and students in one run folder."""

import argparse
import json
import os
import shlex
import shutil
import sys
from functools import partial
from pathlib import Path
from typing import Any

from ftfast.distillation.monitor.trackers import DEFAULT, LIBRARIES
from ftfast.distillation.runtime import torchrun
from ftfast.distillation.runtime.output_folder import folder_at
from ftfast.distillation.runtime.signals import Interrupted, signals_interrupt
from ftfast.distillation.settings import options
from ftfast.distillation.settings.hub_teacher import with_hub_teacher
from ftfast.distillation.settings.presets import for_a_try, settings_of
from ftfast.distillation.store.header import with_store
from ftfast.errors import DistillError, SettingsError, printable


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command, and one for each setting."""
    parser.add_argument(
        "--output", metavar="FOLDER", help="the run folder [runs/<preset or data>, of a --store with -store behind it]"
    )
    parser.add_argument(
        "--rates", metavar="X,...", help="a run for each of these paraphrase rates, with one teacher, and their table"
    )
    parser.add_argument(
        "--steps", metavar="N", help="a try: N steps of each training, on noise in the shape of the data"
    )
    parser.add_argument("--resume", action="store_true", help="continue the run in --output, with the same settings")
    parser.add_argument("--print-settings", action="store_true", help="print the settings as JSON, and run nothing")
    parser.add_argument("--json", action="store_true", help="print results.json in place of the table")
    parser.add_argument(
        "--checkpoint-seconds", metavar="X", default="30", help="time between two checkpoints of a training [30]"
    )
    parser.add_argument(
        "--checkpoints-kept", metavar="N", default="3", help="checkpoints on the way that stay, the newest [3]"
    )
    parser.add_argument(
        "--track",
        metavar="NAME,...",
        default=DEFAULT,
        help=f"who is told of settings, losses, accuracies and the table (some of {', '.join(LIBRARIES)}, or '' for "
        f"none) [{DEFAULT}]",
    )
    options.add_arguments(parser.add_argument_group("settings"))


def run(args: argparse.Namespace) -> int:
    """Runs the command; the table or the JSON goes to standard output, all else to standard error."""
    torchrun.end_again()
    try:
        return _run(args)
    except (DistillError, Interrupted) as end:
        torchrun.remember(end)
        raise


def _run(args: argparse.Namespace) -> int:
    settings = settings_of(args.preset, **with_store(with_hub_teacher(options.given_settings(args))))
    if args.steps is not None:
        settings = for_a_try(settings, _count("steps", args.steps))
    if args.print_settings:
        print(json.dumps(settings.resolved().to_json(), indent=2))
        return 0
    from ftfast.commands.rates import print_rates, run_rates, write_rates
    from ftfast.distillation.monitor.terminal import console_for_tables
    from ftfast.distillation.phases.report import print_table, write_report
    from ftfast.distillation.run import run as run_distillation

    # Beside the run of the teacher, not on it.
    if args.output is None:
        output = Path(f"runs/{args.preset or settings.data}{'-store' * (settings.store is not None)}")
    else:
        output = folder_at(args.output)
    rates = _rates(args.rates) if args.rates is not None else None
    run = run_distillation if rates is None else partial(run_rates, rates=rates)
    try:
        with signals_interrupt():
            results = run(
                settings,
                output=output,
                resume=args.resume,
                checkpoint_seconds=_seconds(args.checkpoint_seconds),
                checkpoints_kept=_count("checkpoints_kept", args.checkpoints_kept),
                track=args.track,
            )
    except Interrupted as interruption:
        advice = f"run the same command with --resume to continue {output}"
        raise Interrupted(interruption.number, advice) from None
    if os.environ.get("RANK", "0") != "0":  # of torchrun's processes, one speaks
        return 0
    write, show, report = (
        (write_report, print_table, "report.md") if rates is None else (write_rates, print_rates, "rates.md")
    )
    write(output, results)
    if args.json:
        print(json.dumps(results, indent=2))
    else:
        show(results, console_for_tables())
        print(f"Report: {printable(str(output / report))}")
        if rates is None and not settings.is_noise:
            print("Next:", *_next_commands(output, results), sep="\n  ")
    return 0


def _next_commands(output: Path, results: dict[str, Any]) -> list[str]:
    """What to do with a finished run, on a student of its last method."""
    student = output / "students" / list(results["methods"])[-1] / "seed0"
    data = results["settings"]["data_dir"]
    commands = [
        *([["tensorboard", "--logdir", logs]] if (logs := output / "tensorboard").is_dir() else []),
        ["ftfast", "evaluate", student, *(["--data-dir", data] if data else []), "--confusion", "confusion.png"],
        ["ftfast", "export", student, "student.pt2"],
    ]
    return [printable(shlex.join([_as_called(str(program)), *map(str, words)])) for program, *words in commands]


def _as_called(program: str) -> str:
    """A program's name, with the folder of this Python where the shell does not find it by itself."""
    beside = Path(sys.executable).with_name(program)
    if shutil.which(program) or not beside.exists():
        return program
    return os.path.relpath(beside) if beside.is_relative_to(Path.cwd()) else str(beside)


def _rates(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(word) for word in text.split(","))
    except ValueError:
        raise SettingsError(f"rates is {text!r}; it takes numbers separated by commas.") from None


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not seconds >= 0:
        raise SettingsError(f"checkpoint_seconds is {text!r}; it takes a number of at least 0.")
    return seconds


def _count(name: str, text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise SettingsError(f"{name} is {text!r}; it takes a whole number of at least 1.")
    return int(text)
