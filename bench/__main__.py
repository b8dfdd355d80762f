"""``python -m bench``: the commands, and what they print."""

import argparse
import sys
from pathlib import Path

from bench import readme
from bench.arguments import ALL, build_parser, check_out, settings_from
from bench.guard import command as guard
from bench.harness.records import RecordError, Row, load, save
from bench.harness.registry import discover
from bench.harness.running import Work, measure, prepare
from bench.results import compare, plots, visited
from bench.training import prediction
from ftfast.cli import open_closed_streams
from ftfast.distillation.monitor.terminal import console_for_tables, print_fitting


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


COMMANDS = {
    "readme": readme.main,
    "plot": plot_main,
    "compare": compare.main,
    "record": visited.main,
    "guard": guard.main,
    "prediction": prediction.main,
}


def is_failure(row: Row, peers_named: bool) -> bool:
    """Whether a row without a figure should fail the run: not that of a peer that is not installed, unless named."""
    return bool(row.reason) and (peers_named or not row.details.get("not_installed"))


def main(arguments: list[str]) -> int:
    """Returns 0, 1 where a candidate has no figure, or exits with 2 for bad input."""
    open_closed_streams("python -m bench")
    if arguments[:1] and arguments[0] in COMMANDS:
        return COMMANDS[arguments[0]](arguments[1:])
    benches = discover()
    parser = build_parser(benches)
    options = parser.parse_args(arguments)
    console = console_for_tables()
    if options.list:
        for name, bench in benches.items():
            console.print(f"{name:<12} {bench.summary}", highlight=False)
        return 0
    for name in options.what:
        if name not in benches and name != ALL:
            parser.error(f"WHAT is {name!r}; take of {', '.join(benches)}, or {ALL}.")
    settings = settings_from(options, parser)
    if options.out is not None and (problem := check_out(options.out, options.overwrite)):
        parser.error(problem)
    prepare(options.threads)
    named = [name for name in options.what if name != ALL]
    everything = not options.what or ALL in options.what
    works = []
    for name in dict.fromkeys([*named, *benches] if everything else named):
        if not (refusal := benches[name].refuses(settings)):
            works.append(Work(name, benches[name], settings))
        elif name in named:
            parser.error(refusal)
        else:
            print(f"python -m bench: {refusal}", file=sys.stderr)
    quick_note = ["--quick: few calls, not to be quoted"] if options.quick else []
    record = measure(works, settings.device, arguments, quick_note)
    if options.out is not None:
        save(record, options.out)
    if options.json:
        print(record.to_json(), end="")
    else:
        for work in works:
            for table in work.bench.tables(record.of(work.name)):
                print_fitting(table, console)
    return 1 if any(is_failure(row, options.peers is not None) for row in record.rows) else 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
