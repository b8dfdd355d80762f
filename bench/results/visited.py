"""``python -m bench record``: a record of what a visit to a GPU found."""

import argparse
import json
from dataclasses import replace
from pathlib import Path

from bench.arguments import check_out
from bench.harness.records import SCHEMA, Record, RecordError, parse, save


def record_of(lines: str, source: str) -> Record:
    """A record of the rows in the lines that ``bench/on_gpu.py`` writes.

    Raises:
        RecordError: no line of a machine and its rows, or one that is not as it was written.
    """
    try:
        found = [json.loads(line) for line in lines.splitlines()]
        begun = [line["record"] for line in found if "record" in line]
        rows = [line["row"] for line in found if "row" in line]
        during = [line["gpu"] for line in found if line.get("gpu")]
    except (ValueError, TypeError) as error:
        raise RecordError(f"{source} is not what a visit writes: {error}.") from None
    if not rows or not begun:
        raise RecordError(f"{source} has no row; take the visit.jsonl of a visit that came to its benches.")
    record = parse(json.dumps({"schema": SCHEMA, **begun[0], "rows": rows}), source)
    if during:
        record.hardware["gpu"]["run"] = during[-1]
    formulas = {name: formula for one in begun for name, formula in one["formulas"].items() if formula}
    return replace(record, formulas=formulas, settings={**record.settings, "command": "python -m bench.on_gpu"})


def main(arguments: list[str]) -> int:
    """Returns 0, or exits with 2 for bad input."""
    parser = argparse.ArgumentParser(
        prog="python -m bench record", description="Make a record of the lines of a visit to a GPU."
    )
    parser.add_argument("lines", type=Path, metavar="VISIT", help="the visit.jsonl of python -m bench.on_gpu")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="write the record to FILE")
    parser.add_argument("--overwrite", action="store_true", help="let --out replace a record")
    options = parser.parse_args(arguments)
    if problem := check_out(options.out, options.overwrite):
        parser.error(problem)
    try:
        save(record_of(options.lines.read_text(), str(options.lines)), options.out)
    except (OSError, RecordError, UnicodeDecodeError) as error:
        parser.error(str(error))
    return 0
