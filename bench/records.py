"""The JSON record of a run: what tables, plots and the README are made from."""

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

SCHEMA = "ftfast-bench"
VERSION = 1


class RecordError(ValueError):
    """A file that is no record of this program, or of a newer version of it."""


@dataclass(frozen=True)
class Timing:
    """Milliseconds over all timed calls of all blocks."""

    median: float
    p20: float
    p80: float
    calls: int
    block_medians: list[float]


@dataclass(frozen=True)
class Row:
    """One candidate in one group.

    Attributes:
        bench: the module that measured it.
        group: candidates of one group are compared with each other.
        candidate, work: what was timed.
        timing: None where there is no figure; ``reason`` then says why.
        least_bytes: the fewest bytes that the work has to move, or None where that says nothing.
        gate: the errors against the float64 reference, or None where nothing is computed that could be wrong.
        details: shape, dims, dtype, layout, upstream gradient, backend and the like.
    """

    bench: str
    group: str
    candidate: str
    work: str
    timing: Timing | None
    least_bytes: int | None = None
    gate: dict[str, Any] | None = None
    reason: str = ""
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def gbps(self) -> float | None:
        """GB/s, counted from the least bytes."""
        if self.timing is None or self.least_bytes is None:
            return None
        return self.least_bytes / (self.timing.median * 1e6)


@dataclass(frozen=True)
class Record:
    """A run.

    Attributes:
        created: UTC, ISO 8601.
        hardware, software, settings: as :mod:`bench.machine` and the command line found them.
        notes: what a reader of the figures has to know, such as a busy machine.
        formulas: what ``least_bytes`` counts, by bench.
    """

    created: str
    hardware: dict[str, Any]
    software: dict[str, Any]
    settings: dict[str, Any]
    rows: list[Row]
    notes: list[str] = field(default_factory=list)
    formulas: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> str:
        """The record as a file holds it."""
        return json.dumps({"schema": SCHEMA, "version": VERSION, **asdict(self)}, indent=1, allow_nan=False) + "\n"

    @property
    def digest(self) -> str:
        """Names the record's contents; pictures carry it."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:16]

    def of(self, bench: str) -> list[Row]:
        """The rows of one bench."""
        return [row for row in self.rows if row.bench == bench]


def parse(text: str, source: str) -> Record:
    """A record from JSON; ``source`` names it in errors.

    Raises:
        RecordError: not JSON, another schema, a newer version, or fields that are missing or unknown.
    """
    try:
        data = json.loads(text)
    except json.JSONDecodeError as error:
        raise RecordError(f"{source} is not JSON ({error}); take a file that python -m bench --out wrote.") from None
    if not isinstance(data, Mapping) or data.get("schema") != SCHEMA:
        raise RecordError(f"{source} is not a bench record; take a file that python -m bench --out wrote.")
    version = data.get("version")
    if not isinstance(version, int) or version < 1:
        raise RecordError(f"{source} has version {version!r}; records have a version of at least 1.")
    if version > VERSION:
        raise RecordError(f"{source} has version {version} and this program reads up to {VERSION}; update ftfast.")
    fields = {name: value for name, value in data.items() if name not in ("schema", "version")}
    try:
        rows = [
            Row(**{**row, "timing": None if row["timing"] is None else Timing(**row["timing"])})
            for row in fields.pop("rows")
        ]
        return Record(**fields, rows=rows)
    except (KeyError, TypeError, AttributeError) as error:
        raise RecordError(f"{source} is damaged: {error}; measure it again.") from None


def load(path: Path) -> Record:
    """Read a record.

    Raises:
        RecordError: see :func:`parse`.
        OSError: the file cannot be read.
    """
    return parse(path.read_text(), str(path))


def save(record: Record, path: Path) -> None:
    """Write a record aside and rename it, so that no reader meets half of one."""
    write_whole(path, record.to_json())


def write_whole(path: Path, text: str) -> None:
    """Write text to a file aside and rename it."""
    handle, aside = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w") as file:
            file.write(text)
        os.chmod(aside, 0o644)
        os.replace(aside, path)
    except BaseException:
        os.unlink(aside)
        raise
