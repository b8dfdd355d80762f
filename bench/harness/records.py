"""The JSON record of a run: what tables, plots and the README are made from."""

import hashlib
import json
import os
import tempfile
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from bench.harness.machine import CHECKOUT
from bench.harness.power import FAULTS

SCHEMA = "ftfast-bench"
# 2: hardware names the processor by its family and model too, and a GPU's clocks, power and throttling during the run;
# software what the extension was built with; rows of a GPU their energy and peak memory.
VERSION = 2
# GPU clocks further apart than this are another device for a figure's purposes.
CLOCK_TOLERANCE = 0.03


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
        hardware, software, settings: as :mod:`bench.harness.machine` and the command line found them.
        notes: what a reader of the figures has to know, such as a busy machine.
        formulas: what ``least_bytes`` counts, by bench.
        version: of the file; an older one's is kept, and with it the digest that its pictures carry.
    """

    created: str
    hardware: dict[str, Any]
    software: dict[str, Any]
    settings: dict[str, Any]
    rows: list[Row]
    notes: list[str] = field(default_factory=list)
    formulas: dict[str, str] = field(default_factory=dict)
    version: int = VERSION

    def to_json(self) -> str:
        """The record as a file holds it."""
        fields = asdict(self)
        version = fields.pop("version")
        return json.dumps({"schema": SCHEMA, "version": version, **fields}, indent=1, allow_nan=False) + "\n"

    @property
    def digest(self) -> str:
        """Names the record's contents; pictures carry it."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:16]

    def of(self, bench: str) -> list[Row]:
        """The rows of one bench."""
        return [row for row in self.rows if row.bench == bench]

    def groups(self, bench: str) -> set[tuple[str, str]]:
        """Bench and name of the groups of one bench."""
        return {(row.bench, row.group) for row in self.of(bench)}

    def only(self, groups: Collection[tuple[str, str]]) -> "Record":
        """The record with the rows of some groups alone, each given as its bench and its name."""
        return replace(self, rows=[row for row in self.rows if (row.bench, row.group) in groups])

    @property
    def device_name(self) -> str:
        """The GPU's name, or the processor's with what tells it from others of the name."""
        if gpu := self.hardware.get("gpu"):
            return str(gpu["name"])
        caches = ", ".join(f"{level} {size}" for level, size in self.hardware.get("caches", {}).items())
        return f"{self.hardware['cpu']}{f' ({caches})' if caches else ''}"


def other_device(a: Record, b: Record) -> str:
    """Why two records are of different devices or, on a CPU, of different numbers of threads, or nothing."""
    if a.device_name != b.device_name:
        return f"the devices differ: {a.device_name} and {b.device_name}."
    if "gpu" in a.hardware:
        return ""
    models = [record.hardware.get("cpu_model") for record in (a, b)]
    if all(models) and models[0] != models[1]:
        return f"the processors differ: {models[0]} and {models[1]}."
    threads = [record.settings.get("threads") for record in (a, b)]
    if threads[0] != threads[1]:
        return f"the threads differ: {threads[0]} and {threads[1]}; measure again with the same --threads."
    return ""


def comparable(a: Record, b: Record) -> str:
    """Why the figures of two records say nothing about each other, in one sentence, or nothing.

    Device, a CPU's threads, the dtypes of the benches that both have, and a GPU's clocks have to agree, the latter to
    within ``CLOCK_TOLERANCE``, and neither GPU may have been slowed down by its temperature or its supply. A power cap
    alone is no reason: large matmuls meet it on a sound GPU, and it shows in the clocks.
    """
    if reason := other_device(a, b):
        return reason
    shared = {row.bench for row in a.rows} & {row.bench for row in b.rows}
    if not shared:
        return "they have no bench in common."
    for bench in sorted(shared):
        dtypes = [sorted({row.details.get("dtype", "") for row in record.of(bench)} - {""}) for record in (a, b)]
        if dtypes[0] != dtypes[1]:
            found = " and ".join(", ".join(names) or "none" for names in dtypes)
            return f"the dtypes of {bench} differ: {found}; measure again with the same --dtype."
    return _clocks_differ(a, b) if "gpu" in a.hardware else ""


def _clocks_differ(a: Record, b: Record) -> str:
    runs = [record.hardware["gpu"].get("run", {}) for record in (a, b)]
    for run in runs:
        if faults := sorted(FAULTS.intersection(run.get("throttling", {}))):
            return f"a GPU was throttled during its run ({', '.join(faults)}); measure again once it is not."
    for clock, what in (("sm_clock_mhz", "SM"), ("memory_clock_mhz", "memory")):
        medians = [run[clock]["median"] for run in runs if clock in run]
        if len(medians) == 2 and abs(medians[0] - medians[1]) > CLOCK_TOLERANCE * max(medians):
            return f"the {what} clocks differ by more than {CLOCK_TOLERANCE:.0%}: {medians[0]} and {medians[1]} MHz."
    return ""


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
        return Record(**fields, rows=rows, version=version)
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


RECORDS = CHECKOUT / "bench" / "records"


def newest_records(folder: Path) -> dict[str, dict[str, tuple[Path, Record]]]:
    """The newest record of every bench on each device type: ``[bench][device]``."""
    found: dict[str, dict[str, tuple[Path, Record]]] = {}
    for path in sorted(folder.glob("*.json")):
        record = load(path)
        for bench in {row.bench for row in record.rows}:
            held = found.setdefault(bench, {}).get(record.hardware["device"])
            if held is None or held[1].created < record.created:
                found[bench][record.hardware["device"]] = (path, record)
    return found


def newest_alone(folder: Path) -> dict[str, dict[str, Record]]:
    """:func:`newest_records` without their paths."""
    return {
        bench: {device: record for device, (_, record) in devices.items()}
        for bench, devices in newest_records(folder).items()
    }
