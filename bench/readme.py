"""The measured blocks of README and docs: written from committed records, and checked against them."""

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

BLOCK = re.compile(r"(<!-- bench:(\w+)( brief)? -->\n)(.*?)(<!-- /bench -->)", re.DOTALL)
# Blocks made of several benches' records.
DERIVED: dict[str, Callable[[dict[str, dict[str, Record]]], str]] = {"prediction": prediction.markdown}


class ReadmeError(ValueError):
    """A page that cannot be brought up to date."""


def pages_with_blocks() -> list[Path]:
    """The checkout's README and those pages of its docs that have a block."""
    pages = [CHECKOUT / "README.md", *sorted((CHECKOUT / "docs").rglob("*.md"))]
    return [page for page in pages if page.name == "README.md" or BLOCK.search(page.read_text())]


def regenerate(text: str, folder: Path, page: Path) -> str:
    """A page's text with its blocks as the records have them; a ``brief`` one has the first table alone.

    Raises:
        ReadmeError: no block, or one of an unknown bench.
        RecordError: a record that cannot be read.
    """
    benches = discover()
    newest = newest_records(folder)
    if not BLOCK.search(text):
        raise ReadmeError(f"{page} has no block '<!-- bench:NAME -->' ... '<!-- /bench -->'; add one.")

    def block(match: re.Match[str]) -> str:
        name = match[2]
        if name in DERIVED:
            return f"{match[1]}{DERIVED[name](newest_alone(folder))}\n{match[5]}"
        if name not in benches:
            raise ReadmeError(f"{page} has a block of {name!r}; there are {', '.join([*benches, *DERIVED])}.")
        records = {
            device: (_link(plots.picture_paths(path, name)[0], page), record)
            for device, (path, record) in newest.get(name, {}).items()
        }
        brief = {"brief": True} if match[3] else {}
        return f"{match[1]}{benches[name].markdown(records, **brief)}\n{match[5]}"

    return BLOCK.sub(block, text)


def shown_pictures(text: str, folder: Path) -> Iterator[tuple[str, Path, Record, list[Path]]]:
    """``(bench, record's path, record, pictures)`` of every newest record of which a page's text shows pictures."""
    for name, devices in newest_records(folder).items():
        for path, record in devices.values():
            pictures = [plots.picture_paths(path, picture)[0] for picture in plots.picture_names(name)]
            if shown := [picture for picture in pictures if picture.name in text]:
                yield name, path, record, shown


def stale_pictures(text: str, folder: Path) -> list[Path]:
    """Pictures that a page needs and that were made from another record, or not at all."""
    return [
        svg
        for _, _, record, pictures in shown_pictures(text, folder)
        for svg in pictures
        if not (svg.is_file() and plots.digest_in(svg) == record.digest)
    ]


def _link(picture: Path, page: Path) -> str:
    return Path(os.path.relpath(picture, page.parent)).as_posix()


def main(arguments: list[str]) -> int:
    """``python -m bench readme``: 0 where all is well, 1 where --check finds a difference, 2 for bad input."""
    parser = argparse.ArgumentParser(
        prog="python -m bench readme",
        description="Write the measured blocks of README and docs, <!-- bench:NAME --> to <!-- /bench -->, from the "
        "newest record of each device type, and draw the pictures that they show.",
    )
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 where pages and records differ")
    parser.add_argument("--page", type=Path, action="append", help="default: README.md and all of docs/ with a block")
    parser.add_argument("--records", type=Path, default=RECORDS, help="folder of records, default: bench/records")
    options = parser.parse_args(arguments)
    stale: list[Path] = []
    try:
        for page in options.page or pages_with_blocks():
            stale += bring_up_to_date(page, options.records, only_check=options.check)
    except (OSError, UnicodeDecodeError, ReadmeError, RecordError) as error:
        parser.error(str(error))
    for out_of_date in stale:
        print(f"{out_of_date} differs from the records; run python -m bench readme.", file=sys.stderr)
    return 1 if stale else 0


def bring_up_to_date(page: Path, records: Path, *, only_check: bool) -> list[Path]:
    """Writes a page and draws its pictures, or with ``only_check`` gives those of them that should be written anew."""
    text = page.read_text()
    fresh = regenerate(text, records, page)
    if only_check:
        return ([page] if fresh != text else []) + stale_pictures(fresh, records)
    for name, path, record, _ in shown_pictures(fresh, records):
        plots.plot(record, name, path)
    if fresh != text:
        write_whole(page, fresh)
    return []
