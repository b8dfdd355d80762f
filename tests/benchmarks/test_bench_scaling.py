"""Ceilings, sweeps, and the pictures of both: curves and rooflines are made from a record alone."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import readme
from bench.__main__ import main
from bench.harness import records
from bench.harness.measuring import Plan
from bench.harness.records import Record, Row, Timing
from bench.harness.registry import Settings
from bench.kernels import ceilings, ft_loss, scaling
from bench.peers import COPY, EAGER, YARDSTICK
from bench.results import curves, plots, roofline
from bench.results.throughput import MATMUL

BOTH = "forward+backward"
CPU = torch.device("cpu")
PLAN = Plan(blocks=1, warmups=1, calls=2, block_seconds=0.0)
SETTINGS = Settings(CPU, (torch.float32,), (), ("nchw",), (), PLAN, head_dtypes=(torch.float32,), quick=True)


@pytest.fixture(autouse=True)
def _same_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def row(candidate: str, work: str, ms: float, *, group: str, bench: str = "scaling", **fields: Any) -> Row:
    return Row(bench, group, candidate, work, Timing(ms, ms, ms, 2, [ms]), **fields)


def record_of(rows: list[Row]) -> Record:
    return Record(
        created="2026-01-02T03:04:05+00:00",
        hardware={"cpu": "a processor", "device": "cpu"},
        software={"torch": "2.0", "revision": None, "dirty": None},
        settings={"threads": 2},
        rows=rows,
    )


def sweep_record() -> Record:
    """N doubles twice: eager 40 µs a sample, ours 4, 2 and 2; the copy moves 20 GB/s."""
    rows = []
    for samples, ours in ((8, 4.0), (16, 2.0), (32, 2.0)):
        details = {
            "sweep": scaling.BY_SAMPLES,
            "value": samples,
            "samples": samples,
            "work_of_a_sample": 100,
            "dtype": "float32",
            "flops": 15 * 100 * samples,
        }
        fields: dict[str, Any] = {"group": f"N {samples}", "least_bytes": 10_000 * samples, "details": details}
        rows += [
            row(EAGER, BOTH, 40e-3 * samples, **fields),
            row(scaling.OURS, BOTH, ours * 1e-3 * samples, **fields),
            row(COPY, COPY, 0.5e-3 * samples, **fields),
        ]
    return record_of(rows)


@pytest.mark.slow
def test_a_sweep_says_where_its_points_stand_and_measures_their_ceiling_beside_them() -> None:
    steps: list[str] = []
    rows = scaling.run(SETTINGS, steps.append)
    assert len(steps) == scaling.BENCH.size(SETTINGS)
    assert not [row.reason for row in rows if row.reason]
    sweeps = curves.sweeps(rows)
    assert list(sweeps) == [scaling.BY_SAMPLES, scaling.BY_CHANNELS, scaling.BY_MAP, scaling.HEAD_BY_SAMPLES]
    for name, candidates in sweeps.items():
        expected = {EAGER, scaling.OURS} | (set() if name == scaling.HEAD_BY_SAMPLES else {YARDSTICK})
        assert set(candidates) == expected
        for points in candidates.values():
            values = [point.value for point in points]
            assert values == sorted(set(values))
            assert len(values) >= 3
            assert all(point.microseconds and point.percent for point in points)
    for point in sweeps[scaling.BY_SAMPLES][scaling.OURS]:
        assert point.row.details["samples"] == point.row.details["dims"][0] == point.value
    work = [point.row.details["work_of_a_sample"] for point in sweeps[scaling.BY_MAP][scaling.OURS]]
    assert work == [32 * point.value**2 for point in sweeps[scaling.BY_MAP][scaling.OURS]]


def test_time_per_sample_and_percent_of_the_ceiling() -> None:
    points = curves.sweeps(sweep_record().rows)[scaling.BY_SAMPLES]
    assert [point.microseconds for point in points[scaling.OURS]] == pytest.approx([4.0, 2.0, 2.0])
    assert [point.microseconds for point in points[EAGER]] == pytest.approx([40.0] * 3)
    # 10 kB a sample in 2 µs are 5 of the copy's 20 GB/s.
    assert [point.percent for point in points[scaling.OURS]] == pytest.approx([12.5, 25.0, 25.0])
    text = scaling.markdown({"cpu": ("picture.svg", sweep_record())})
    assert "(picture.svg)" in text
    assert "| 16 | 2.00 | 40.0 | 20.0 | 25.0 |" in text
    assert "CUDA GPU: not measured yet." in text


def test_a_head_is_measured_against_the_matmul() -> None:
    details = {"sweep": "N", "value": 2, "samples": 2, "work_of_a_sample": 1, "ceiling": MATMUL}
    rows = [
        row(scaling.OURS, BOTH, 4.0, group="g", least_bytes=1, details={**details, "flops": 1000}),
        row(MATMUL, MATMUL, 1.0, group="g", details={**details, "flops": 500}),
    ]
    assert curves.sweeps(rows)["N"][scaling.OURS][0].percent == pytest.approx(50.0)


def test_a_point_without_a_figure_leaves_a_gap(tmp_path: Path) -> None:
    record = sweep_record()
    broken = Row("scaling", "N 8", scaling.OURS, BOTH, None, reason="gate is red", details=record.rows[1].details)
    record.rows[1] = broken
    (first, *_) = curves.sweeps(record.rows)[scaling.BY_SAMPLES][scaling.OURS]
    assert first.microseconds is None
    assert plots.plot(record, "scaling", tmp_path / "record.json")
    assert any("gate is red" in str(table.title) for table in scaling.show(record.rows))


def test_curves_and_roofline_come_from_a_record_alone(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    records.save(sweep_record(), path)
    assert main(["plot", str(path)]) == 0
    names = {f"record.{picture}.{kind}" for picture in ("scaling", "scaling.roofline") for kind in ("svg", "png")}
    assert {file.name for file in tmp_path.iterdir()} == {"record.json", *names}
    first = {name: (tmp_path / name).read_bytes() for name in names}
    assert main(["plot", str(path)]) == 0
    assert {name: (tmp_path / name).read_bytes() for name in names} == first
    for name in names:
        if name.endswith("svg"):
            assert plots.digest_in(tmp_path / name) == sweep_record().digest


def test_readme_has_a_block_of_scaling_with_its_picture(tmp_path: Path) -> None:
    folder, page = tmp_path / "records", tmp_path / "README.md"
    folder.mkdir()
    page.write_text("<!-- bench:scaling -->\n<!-- /bench -->\n")
    records.save(sweep_record(), folder / "cpu.json")
    arguments = ["--page", str(page), "--records", str(folder)]
    assert readme.main([*arguments, "--check"]) == 1
    assert readme.main(arguments) == 0
    assert "(records/cpu.scaling.svg)" in page.read_text()
    assert (folder / "cpu.scaling.svg").is_file()
    assert readme.main([*arguments, "--check"]) == 0
    (folder / "cpu.scaling.svg").write_text("another picture")
    assert readme.main([*arguments, "--check"]) == 1


# Roofline


def roofline_record() -> Record:
    wide, narrow = {"dtype": "float32"}, {"dtype": "bfloat16"}
    return record_of(
        [
            row(ft_loss.OURS, BOTH, 1.0, group="g", bench="ft_loss", least_bytes=12, details={"flops": 15, **wide}),
            row(ft_loss.OURS, "forward", 1.0, group="g", bench="ft_loss", least_bytes=8, details={"flops": 9, **wide}),
            row(COPY, COPY, 1.0, group="g", bench="ft_loss", least_bytes=30_000_000, details=wide),
            row("library", "input gradient", 2.0, group="c", bench="conv3x3", least_bytes=10, details={"flops": 100}),
            row(COPY, COPY, 1.0, group="memory", bench="ceilings", least_bytes=10_000_000, details=wide),
            row(MATMUL, MATMUL, 1.0, group="m", bench="ceilings", details={"flops": 5_000_000, **wide}),
            row(MATMUL, MATMUL, 1.0, group="n", bench="ceilings", details={"flops": 9_000_000, **narrow}),
        ]
    )


def test_roofline_places_whole_steps_under_the_measured_ceilings(tmp_path: Path) -> None:
    record = roofline_record()
    ((of_loss, intensity, gflops),) = roofline.points(record.of("ft_loss"))
    assert of_loss.work == BOTH
    assert intensity == pytest.approx(15 / 12)
    assert gflops == pytest.approx(15e-6)
    ((of_convolution, *_),) = roofline.points(record.of("conv3x3"))
    assert of_convolution.work == "input gradient"
    assert roofline.bandwidths(record) == pytest.approx({"copy, larger than the caches": 10.0, "fastest copy": 30.0})
    assert roofline.matmul_rates(record) == pytest.approx({"float32": 5.0, "bfloat16": 9.0})
    pictures = plots.plot(record, "ft_loss", tmp_path / "record.json")
    assert tmp_path / "record.ft_loss.roofline.svg" in pictures
    assert plots.plot(record, "ceilings", tmp_path / "record.json") == []


def test_committed_heads_have_a_roofline(tmp_path: Path) -> None:
    path = records.RECORDS / "cpu-amd-epyc.json"
    record = records.load(path)
    assert len(roofline.points(record.of("ft_head"))) >= 6
    names = [picture.name for picture in plots.plot(record, "ft_head", tmp_path / path.name)]
    assert names == ["cpu-amd-epyc.ft_head.roofline.svg", "cpu-amd-epyc.ft_head.roofline.png"]


# Ceilings


def test_ceilings_are_memory_and_a_matmul_of_each_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ceilings.QUICK_MATMUL_SIZE, "cpu", 64)
    monkeypatch.setitem(ceilings.QUICK_LARGE_BYTES, "cpu", 2**16)
    steps: list[str] = []
    rows = ceilings.run(SETTINGS, steps.append)
    assert len(steps) == ceilings.BENCH.size(SETTINGS)
    found = {(row.candidate, row.details["dtype"]): row for row in rows}
    assert set(found) == {(COPY, "float32"), (YARDSTICK, "float32"), (MATMUL, "float32"), (MATMUL, "bfloat16")}
    assert found[COPY, "float32"].least_bytes == 2 * 2**16
    assert found[YARDSTICK, "float32"].least_bytes == 3 * 2**16
    assert found[MATMUL, "float32"].details["flops"] == 2 * 64**3
    text = ceilings.markdown({"cpu": ("", record_of(rows))})
    assert "| matmul | matmul 64x64, bfloat16 |" in text


def test_large_means_larger_than_the_caches() -> None:
    for large in (ceilings.LARGE_BYTES, ceilings.QUICK_LARGE_BYTES):
        assert large["cuda"] >= 2 * 60 * 2**20  # a GPU's L2 is of tens of MiB
        assert large["cpu"] >= 2**26
