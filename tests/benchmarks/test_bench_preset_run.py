"""The bench of a whole preset: what it makes of a run's telemetry, and a quick run."""

from typing import Any

import pytest

from bench.__main__ import main
from bench.harness.records import Record, Row, Timing, load
from bench.training import preset_run
from bench.training.preset_run import Size, _found, pause_share
from bench.training.step_peers import IMAGENET

SIZE = Size(IMAGENET, 100, 30_000, 1000, 4)
RESULTS = {"methods": {"ft": {"students": [{"images_per_second": 4200.0}]}}}


def line(epoch: int, rate: float, **rest: Any) -> dict[str, Any]:
    quiet = {"checkpoints": 0, "checkpoint_pause": 0.0, "seconds": 2.0}
    return {"epoch": epoch, "images_per_second": rate, **quiet, **rest}


LINES = [
    line(1, 10.0, milliseconds={"data": 100.0}, checkpoints=1, checkpoint_pause=0.3),  # torch.compile
    line(2, 4000.0, milliseconds={"data": 1.0, "teacher": 5.0}, gpu={"watts": 600.0, "memory_bytes": 2.0**30}),
    line(2, 5000.0, milliseconds={"data": 3.0, "teacher": 7.0}, gpu={"watts": 700.0, "memory_bytes": 2.0**30}),
    line(2, 5000.0, checkpoints=2, checkpoint_pause=0.15),
]


def test_the_last_epoch_is_what_is_told_of() -> None:
    found = _found(LINES, RESULTS, SIZE)
    assert found["step_milliseconds"] == pytest.approx([25.0, 20.0, 20.0])
    assert found["milliseconds"] == {"data": 2.0, "teacher": 6.0}
    assert found["gpu"] == {"watts": 650.0, "memory_bytes": 2.0**30}
    assert found["checkpoints"] == 3
    assert found["seconds_per_checkpoint"] == pytest.approx(0.3)
    with pytest.raises(RuntimeError, match="more --steps"):
        _found(LINES[:1], RESULTS, SIZE)


def row(loader: str = "gpu", **details: Any) -> Row:
    timing = Timing(20.0, 19.0, 21.0, 3, [20.0])
    return Row("preset_run", "imagenet, 300 steps", loader, "run", timing, details={"images": 100, **details})


def test_pauses_are_told_for_a_checkpoint_every_five_minutes() -> None:
    assert pause_share(row(seconds_per_checkpoint=3.0)) == pytest.approx(0.01)
    assert pause_share(row()) is None


def test_the_readmes_block_has_what_was_found() -> None:
    found = {"images_per_second": 4200.0, "milliseconds": {"data": 2.0}, "seconds_per_checkpoint": 0.3, "gpu": {}}
    rows = [row(**found), Row("preset_run", "imagenet, 300 steps", "folder", "run", None, reason="no memory")]
    record = Record("2026-01-01", {"cpu": "a processor", "device": "cuda"}, {"torch": "2"}, {"threads": 2}, rows)
    text = preset_run.markdown({"cuda": ("record.json", record)})
    assert "| images/s | 4,200 |" in text
    assert "| data, ms | 2.00 |" in text
    assert "| of 5 min, % | 0.100 |" in text
    assert "watts" not in text
    assert "folder: no memory." in text
    assert text.startswith("CPU: not measured yet.")


@pytest.mark.slow
@pytest.mark.usefixtures("forked")
def test_a_quick_run_reads_files_and_writes_checkpoints_that_do_not_stall_it(tmp_path: Any) -> None:
    path = tmp_path / "record.json"
    assert main(["preset_run", "--quick", "--device", "cpu", "--out", str(path)]) == 0
    rows = load(path).rows
    assert [found.candidate for found in rows] == list(preset_run.LOADERS["cpu"])
    for found in rows:
        assert found.details["images_per_second"] > 0
        assert set(found.details["milliseconds"]) == set(preset_run.PARTS)
        share = pause_share(found)
        assert share is not None
        assert share < preset_run.MOST_PAUSE
