"""The README's measured blocks: written from committed records, and checked against them."""

import argparse
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from bench.harness.machine import CHECKOUT
from bench.harness.records import RECORDS, Record, RecordError, newest_alone, newest_records, write_whole
from bench.harness.registry import discover
from bench.results import plots
from bench.training import prediction

BLOCK = re.compile(r"(<!-- bench:(\w+) -->\n)(.*?)(<!-- /bench -->)", re.DOTALL)
# Blocks made of several benches' records.
DERIVED: dict[str, Callable[[dict[str, dict[str, Record]]], str]] = {"prediction": prediction.markdown}


class ReadmeError(ValueError):
    """A README that cannot be brought up to date."""


def regenerate(text: str, folder: Path, readme: Path) -> str:
    """The README's text with its blocks as the records have them.

    Raises:
        ReadmeError: no block, or one of an unknown bench.
        RecordError: a record that cannot be read.
    """
    benches = discover()
    newest = newest_records(folder)
    if not BLOCK.search(text):
        raise ReadmeError(f"{readme} has no block '<!-- bench:NAME -->' ... '<!-- /bench -->'; add one.")

    def block(match: re.Match[str]) -> str:
        name = match[2]
        if name in DERIVED:
            return f"{match[1]}{DERIVED[name](newest_alone(folder))}\n{match[4]}"
        if name not in benches:
            raise ReadmeError(f"{readme} has a block of {name!r}; there are {', '.join([*benches, *DERIVED])}.")
        records = {
            device: (_link(plots.picture_paths(path, name)[0], readme), record)
            for device, (path, record) in newest.get(name, {}).items()
        }
        return f"{match[1]}{benches[name].markdown(records)}\n{match[4]}"

    return BLOCK.sub(block, text)


def shown_pictures(text: str, folder: Path) -> Iterator[tuple[str, Path, Record, list[Path]]]:
    """``(bench, record's path, record, pictures)`` of every newest record of which the README shows pictures."""
    for name, devices in newest_records(folder).items():
        for path, record in devices.values():
            pictures = [plots.picture_paths(path, picture)[0] for picture in plots.picture_names(name)]
            if shown := [picture for picture in pictures if picture.name in text]:
                yield name, path, record, shown


def stale_pictures(text: str, folder: Path) -> list[Path]:
    """Pictures that the README needs and that were made from another record, or not at all."""
    return [
        svg
        for _, _, record, pictures in shown_pictures(text, folder)
        for svg in pictures
        if not (svg.is_file() and plots.digest_in(svg) == record.digest)
    ]


def _link(picture: Path, readme: Path) -> str:
    return Path(os.path.relpath(picture, readme.parent)).as_posix()


def main(arguments: list[str]) -> int:
    """``python -m bench readme``: 0 where all is well, 1 where --check finds a difference, 2 for bad input."""
    parser = argparse.ArgumentParser(
        prog="python -m bench readme",
        description="Write the README's measured blocks, <!-- bench:NAME --> to <!-- /bench -->, from the newest "
        "record of each device type, and draw the pictures that they show.",
    )
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 where README and records differ")
    parser.add_argument("--readme", type=Path, default=CHECKOUT / "README.md", help="default: the checkout's")
    parser.add_argument("--records", type=Path, default=RECORDS, help="folder of records, default: bench/records")
    options = parser.parse_args(arguments)
    try:
        text = options.readme.read_text()
        fresh = regenerate(text, options.records, options.readme)
        if options.check:
            stale = [options.readme] if fresh != text else []
            stale += stale_pictures(fresh, options.records)
            for out_of_date in stale:
                print(f"{out_of_date} differs from the records; run python -m bench readme.", file=sys.stderr)
            return 1 if stale else 0
        for name, path, record, _ in shown_pictures(fresh, options.records):
            plots.plot(record, name, path)
        if fresh != text:
            write_whole(options.readme, fresh)
    except (OSError, UnicodeDecodeError, ReadmeError, RecordError) as error:
        parser.error(str(error))
    return 0
