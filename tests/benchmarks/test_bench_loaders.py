"""The bench of the loaders: its files, what it says of loader and step, and a quick run."""

from pathlib import Path
from typing import Any

import pytest

from bench.__main__ import main
from bench.harness.records import Record, Row, Timing
from bench.training import loaders, photographs
from bench.training.loaders import SYNTHETIC, WORK, Rates, rates, verdict
from bench.training.loaders_parts import STEP
from ftfast.distillation.data.photographs.listing import list_photographs


def test_files_are_of_imagenets_size_and_the_shards_hold_the_same(tmp_path: Path) -> None:
    mean = photographs.make_folder(tmp_path / "folder", train=40, val=20, distinct=4)
    assert 95_000 < mean < 125_000
    photographs.make_shards(tmp_path / "folder", tmp_path / "shards")
    for part, count in (("train", 40), ("val", 20)):
        of_folder = list_photographs(tmp_path / "folder", "folder", part)
        of_shards = list_photographs(tmp_path / "shards", "webdataset", part)
        contents = [
            sorted((found.labels[row], found.files.read(row)) for row in range(count))
            for found in (of_folder, of_shards)
        ]
        assert contents[0] == contents[1]
        assert of_folder.classes == photographs.CLASSES
    assert len({content for _, content in contents[0]}) == 4


def timing(milliseconds: float) -> Timing:
    return Timing(milliseconds, milliseconds, milliseconds, 3, [milliseconds])


def row(name: str, milliseconds: float, **details: Any) -> Row:
    return Row(
        "loaders", "JPEG files", name, WORK, timing(milliseconds), details={"images": 100, "workers": 4, **details}
    )


def step_row(milliseconds: float) -> Row:
    return Row("loaders", "the step", "ours", STEP, timing(milliseconds), details={"dims": [256, 3, 224, 224]})


ROWS = [
    row("folder", 100.0, core_seconds_per_image=4e-3, file_bytes=112640.0),
    row("gpu", 10.0, core_seconds_per_image=2e-4, file_bytes=112640.0),
    row(SYNTHETIC, 1.0),
    step_row(64.0),
]


def test_rates_are_of_images_a_second_and_a_core() -> None:
    found = rates(ROWS)
    assert found["folder"] == pytest.approx((1000.0, 250.0, 4000.0))
    assert found[SYNTHETIC].of_core is None
    assert rates(ROWS[:1])["folder"].step is None


def test_whether_loader_or_step_is_the_limit_is_a_sentence() -> None:
    said = verdict("folder", Rates(1000.0, 250.0, 4000.0))
    assert (
        said == "folder gives 1,000 images/s and the step takes 4,000: folder is the limit; 16.0 cores would feed it."
    )
    assert verdict("gpu", Rates(8000.0, None, 4000.0)).endswith(": the step is the limit.")
    assert "no figure" in verdict("gpu", Rates(8000.0, None, None))


def test_the_readmes_block_has_a_line_and_a_sentence_for_every_loader() -> None:
    hardware = {"cpu": "a processor", "device": "cpu"}
    record = Record("2026-01-01", hardware, {"torch": "2"}, {"threads": 2}, ROWS, ["busy"])
    text = loaders.markdown({"cpu": ("record.json", record)})
    assert "| folder | 4 | 1,000 | 250 |" in text
    assert "110 KiB each" in text
    assert "Note: busy." in text
    assert text.count("is the limit") == 3
    assert text.endswith("CUDA GPU: not measured yet.")


@pytest.mark.slow
def test_a_quick_run_has_a_figure_for_every_loader(tmp_path: Path) -> None:
    assert main(["loaders", "--quick", "--device", "cpu", "--out", str(tmp_path / "record.json")]) == 0
