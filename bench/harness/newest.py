"""The newest of the committed records, by bench and device."""

from pathlib import Path

from bench.harness.machine import CHECKOUT
from bench.harness.records import Record, load

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
