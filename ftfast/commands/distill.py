"""``ftfast distill``: teacher, paraphraser and students in one run folder."""

import argparse
import json
import os
import sys
from pathlib import Path

from ftfast.distillation.runtime import torchrun
from ftfast.distillation.runtime.signals import Interrupted, signals_interrupt
from ftfast.distillation.settings import options
from ftfast.distillation.settings.presets import settings_of
from ftfast.distillation.store.header import with_store
from ftfast.errors import DistillError, SettingsError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command, and one for each setting."""
    parser.add_argument(
        "--output", metavar="FOLDER", help="the run folder [runs/<preset or data>, of a --store with -store behind it]"
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
    settings = settings_of(args.preset, **with_store(options.given_settings(args)))
    if args.print_settings:
        print(json.dumps(settings.resolved().to_json(), indent=2))
        return 0
    from rich.console import Console

    from ftfast.distillation.phases.report import print_table, write_report
    from ftfast.distillation.run import run as run_distillation

    # Beside the run of the teacher, not on it.
    output = Path(args.output or f"runs/{args.preset or settings.data}{'-store' * (settings.store is not None)}")
    try:
        with signals_interrupt():
            results = run_distillation(
                settings,
                output,
                resume=args.resume,
                checkpoint_seconds=_seconds(args.checkpoint_seconds),
                checkpoints_kept=_count(args.checkpoints_kept),
            )
    except Interrupted as interruption:
        advice = f"run the same command with --resume to continue {output}"
        raise Interrupted(interruption.number, advice) from None
    if os.environ.get("RANK", "0") != "0":  # of torchrun's processes, one speaks
        return 0
    write_report(output, results)
    if args.json:
        print(json.dumps(results, indent=2))
    else:
        print_table(results, Console(soft_wrap=not sys.stdout.isatty()))
        print(f"Report: {output / 'report.md'}")
    return 0


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not seconds >= 0:
        raise SettingsError(f"checkpoint_seconds is {text!r}; it takes a number of at least 0.")
    return seconds


def _count(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise SettingsError(f"checkpoints_kept is {text!r}; it takes a whole number of at least 1.")
    return int(text)
