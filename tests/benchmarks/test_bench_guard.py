"""The guard, and which records can be compared."""

import json
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import ftfast
from bench import peers
from bench.__main__ import main
from bench.guard import regression
from bench.harness import power, records
from bench.harness.measuring import Plan
from bench.harness.records import Record, Row, Timing, comparable
from bench.harness.registry import Settings
from bench.harness.running import Work, measure
from bench.kernels import ft_loss
from bench.results import compare
from bench.shapes import SHAPES, parse_shape
from ftfast.commands.tune.heads import HEADS

CPU = torch.device("cpu")
# Ours takes most of a millisecond, against which a sleep can be told.
SHAPE = "96x256x7x7"
SECOND_SHAPE = "4x8x4x4"


@pytest.fixture(autouse=True)
def _same_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def case(shape: str, blocks: int = 6) -> Work:
    plan = Plan(blocks=blocks, warmups=2, calls=10, block_seconds=0.02, energy_seconds=0.0)
    settings = Settings(CPU, (torch.float32,), (parse_shape(shape),), ("nchw",), ("eager",), plan)
    return Work(ft_loss.STEM, ft_loss.BENCH, settings)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A record of one small case, the guard's only one."""
    torch.set_num_threads(1)
    works = [case(SHAPE)]
    monkeypatch.setattr(regression, "cases", lambda device: works)
    records.save(measure(works, CPU, ["guard"]), tmp_path / "here.json")
    return tmp_path


def slowed(monkeypatch: pytest.MonkeyPatch, folder: Path, share: float) -> None:
    """Lengthen our loss, forward alone and with backward, by a share of its recorded time."""
    taken = {
        row.work: min(row.timing.block_medians)
        for row in records.load(folder / "here.json").rows
        if row.candidate == ft_loss.OURS and row.timing
    }
    forward = ftfast.FTLoss.forward

    def slow(self: ftfast.FTLoss, student: Tensor, teacher: Tensor) -> Tensor:
        with_backward = torch.is_grad_enabled()
        time.sleep(share * 1e-3 * taken["forward+backward" if with_backward else "forward"])
        return forward(self, student, teacher)

    monkeypatch.setattr(ftfast.FTLoss, "forward", slow)


def guard(*arguments: str) -> int:
    return main(["guard", "--device", "cpu", "--threads", "1", *arguments])


@pytest.mark.slow
def test_the_guard_tells_a_loss_that_is_30_percent_slower(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["--records", str(folder), "--margin", "1.2", "--json"]
    for _ in range(3):  # other tests that run beside this one make it slower than its record now and then
        status = guard(*asked)
        verdict = json.loads(capsys.readouterr().out)
        if status == 0:
            break
    assert verdict["passed"]
    assert {check["peer"] for check in verdict["checks"]} == {peers.YARDSTICK, peers.EAGER}
    assert all(check["recorded"] is not None for check in verdict["checks"])

    slowed(monkeypatch, folder, 0.3)
    assert guard(*asked) == 1
    verdict = json.loads(capsys.readouterr().out)
    assert not verdict["passed"]
    failed = [check for check in verdict["checks"] if not check["passed"]]
    assert failed
    assert all(check["attempts"] == regression.ATTEMPTS for check in failed)
    assert all(check["ratio"] > check["limit"] for check in failed)


@pytest.mark.slow
def test_a_broken_kernel_leaves_no_figure(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    forward = ftfast.FTLoss.forward
    monkeypatch.setattr(ftfast.FTLoss, "forward", lambda *arguments: 1.001 * forward(*arguments))
    assert guard("--records", str(folder)) == 1
    printed = capsys.readouterr().out
    assert "gate is red: the loss is off by 1.0e-03" in printed
    assert "ratio" not in printed
    assert guard("--records", str(folder), "--json") == 1
    verdict = json.loads(capsys.readouterr().out)
    assert (verdict["passed"], verdict["checks"]) == (False, [])
    assert verdict["wrong"]


def renamed(folder: Path) -> Path:
    """The record as if another processor had made it."""
    path = folder / "here.json"
    record = records.load(path)
    records.save(replace(record, hardware={**record.hardware, "cpu": "another processor"}), path)
    return path


def test_a_named_record_of_another_device_class_is_refused_before_anything_is_measured(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(regression, "judge", lambda *arguments, **options: pytest.fail("measured"))
    with pytest.raises(SystemExit) as stop:
        guard(str(renamed(folder)))
    assert stop.value.code == 2
    error = capsys.readouterr().err.strip().rpartition("error: ")[2]
    assert "is of another device class: the devices differ: another processor" in error
    assert "\n" not in error


@pytest.mark.slow
def test_without_a_record_of_this_device_the_bounds_that_hold_everywhere_are_left(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    renamed(folder)
    asked = ["--records", str(folder), "--json"]
    assert guard(*asked) == 0
    verdict = json.loads(capsys.readouterr().out)
    assert "the bounds alone that hold on every machine" in verdict["notes"][0]
    assert {check["peer"] for check in verdict["checks"]} == {peers.EAGER}
    assert all(check["limit"] == 1 and check["recorded"] is None for check in verdict["checks"])

    slowed(monkeypatch, folder, 30)
    monkeypatch.setattr(regression, "cases", lambda device: [case(SHAPE, blocks=2)])
    monkeypatch.setattr(regression, "ATTEMPTS", 1)
    assert guard(*asked) == 1
    assert not json.loads(capsys.readouterr().out)["passed"]


def test_a_case_that_fails_once_is_measured_again_and_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    works = [case(SHAPE), case(SECOND_SHAPE)]
    groups = [ft_loss.group_name(parse_shape(shape), torch.float32, "nchw") for shape in (SHAPE, SECOND_SHAPE)]
    measured: list[int] = []

    def once_disturbed(of: list[Work], *_: object) -> Record:
        measured.append(len(of))
        ours = 2.0 if len(measured) == 1 else 0.5
        found = groups if len(of) == 2 else groups[:1]
        return made_up([row(group, ours if group == groups[0] else 0.5) for group in found])

    def row(group: str, ours: float, candidate: str = ft_loss.OURS) -> Row:
        return Row("ft_loss", group, candidate, "forward", timing(ours), details={"dtype": "float32"})

    def with_peers(record: Record) -> Record:
        names = [group for _, group in dict.fromkeys((found.bench, found.group) for found in record.rows)]
        return replace(record, rows=record.rows + [row(name, 1.0, peers.EAGER) for name in names])

    monkeypatch.setattr(regression, "measure", lambda *arguments: with_peers(once_disturbed(*arguments)))
    verdict = regression.judge(works, {"record": with_peers(made_up([row(group, 0.5) for group in groups]))})
    assert measured == [2, 1]
    assert verdict.passed
    assert sorted(check.attempts for check in verdict.checks) == [1, 2]


def test_the_guard_s_cases_are_one_group_each_and_known_to_records() -> None:
    works = regression.cases(CPU)
    for work in works:
        module = {"ft_loss": ft_loss, "ft_head": regression.ft_head}[work.name]
        assert len(list(module.groups(work.settings))) == 1


@pytest.mark.parametrize("margin", ["0.9", "nan", "inf", "much"])
def test_a_margin_that_is_none_is_refused(margin: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        guard("--margin", margin)
    assert stop.value.code == 2
    assert margin in capsys.readouterr().err


# Which records can be compared


def timing(ms: float) -> Timing:
    return Timing(median=ms, p20=ms, p80=ms, calls=10, block_medians=[ms])


def made_up(rows: list[Row] | None = None, threads: int = 2, **hardware: Any) -> Record:
    found = {"cpu": "a processor", "cpu_model": "maker family 1", "caches": {"L1": "32K"}, "device": "cpu", **hardware}
    if rows is None:
        rows = [
            Row("ft_loss", "group", candidate, "forward", timing(ms), details={"dtype": "float32"})
            for candidate, ms in {ft_loss.OURS: 1.0, peers.EAGER: 4.0}.items()
        ]
    return Record("2026-01-02T03:04:05+00:00", found, {"torch": "2.0"}, {"threads": threads}, rows)


def on_gpu(
    sm: float = 1980.0, memory: float = 2619.0, name: str = "a GPU", throttling: str = "", **extra: Any
) -> Record:
    run = {
        "sm_clock_mhz": {"median": sm},
        "memory_clock_mhz": {"median": memory},
        "throttling": {throttling: 0.1} if throttling else {},
    }
    return made_up(gpu={"name": name, "run": run}, **extra)


def with_dtype(dtype: str) -> Record:
    record = made_up()
    return replace(record, rows=[replace(row, details={"dtype": dtype}) for row in record.rows])


@pytest.mark.parametrize(
    ("a", "b", "reason"),
    [
        (made_up(), made_up(), ""),
        (made_up(), made_up(cpu="another"), "the devices differ: a processor"),
        # A cloud has one name for several generations.
        (made_up(), made_up(caches={"L1": "48K"}), "the devices differ"),
        (made_up(), made_up(cpu_model="maker family 2"), "the processors differ"),
        (made_up(), made_up(cpu_model=None), ""),
        (made_up(), made_up(threads=1), "the threads differ: 2 and 1"),
        (made_up(), on_gpu(), "the devices differ"),
        (made_up(), with_dtype("bfloat16"), "the dtypes of ft_loss differ: float32 and bfloat16"),
        (made_up(), made_up([]), "no bench in common"),
        (on_gpu(), on_gpu(name="another GPU"), "the devices differ: a GPU and another GPU"),
        (on_gpu(), on_gpu(threads=16), ""),
        (on_gpu(), on_gpu(sm=1940), ""),
        (on_gpu(), on_gpu(sm=1900), "the SM clocks differ by more than 3%"),
        (on_gpu(), on_gpu(memory=2400), "the memory clocks differ by more than 3%"),
        (on_gpu(), on_gpu(throttling=power.POWER_CAP), ""),
        (on_gpu(), on_gpu(throttling="hardware thermal slowdown"), "throttled"),
        (on_gpu(), made_up(gpu={"name": "a GPU"}), ""),
    ],
)
def test_what_cannot_be_compared_is_refused_in_words(a: Record, b: Record, reason: str) -> None:
    for found in (comparable(a, b), comparable(b, a)):
        assert bool(found) == bool(reason)
        assert found.count("\n") == 0
    assert reason in comparable(a, b)


def test_compare_shows_ratios_and_no_times(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = [str(tmp_path / name) for name in ("a.json", "b.json")]
    # Twice as slow a machine, and ours three times.
    slower = [replace(row, timing=timing(row.timing.median * factor))
              for row, factor in zip(made_up().rows, (3, 2), strict=True) if row.timing]  # fmt: skip
    for path, record in zip(paths, (made_up(), made_up(slower)), strict=True):
        records.save(record, Path(path))
    assert main(["compare", *paths, "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)["ratios"]
    assert (found["candidate"], found["peer"]) == (ft_loss.OURS, peers.EAGER)
    assert (found["a"], found["b"]) == (pytest.approx(0.25), pytest.approx(0.375))
    assert main(["compare", *paths]) == 0
    assert "1.50" in capsys.readouterr().out

    records.save(made_up(threads=1), Path(paths[1]))
    with pytest.raises(SystemExit) as stop:
        main(["compare", *paths])
    assert stop.value.code == 2
    assert "cannot be compared: the threads differ: 2 and 1" in capsys.readouterr().err


def test_a_graph_is_compared_with_graphs_and_no_floor_is_a_peer() -> None:
    names = ["ftfast", "ftfast, CUDA graph", "eager", "eager, CUDA graph", "copy"]
    found = compare.ratios(compare.times(made_up([Row("b", "g", n, "w", timing(1.0)) for n in names]), compare.median))
    assert {(ratio.candidate, ratio.peer) for ratio in found} == {
        ("ftfast", "eager"),
        ("ftfast, CUDA graph", "eager, CUDA graph"),
    }


# Records


def test_a_record_of_the_first_version_keeps_its_text_and_digest() -> None:
    text = replace(made_up(), version=1).to_json()
    assert json.loads(text)["version"] == 1
    assert records.parse(text, "record.json").to_json() == text
    assert json.loads(made_up().to_json())["version"] == records.VERSION == 2
    for path in (Path(records.__file__).parent / "records").glob("*.json"):
        assert records.load(path).to_json() == path.read_text()


def test_a_record_says_what_the_extension_was_built_with() -> None:
    record = measure([case(SECOND_SHAPE)], CPU, ["ft_loss"])
    assert set(record.software["extension"]) >= {"compiler", "compiler_version", "instruction_sets", "reason"}
    assert {"revision", "dirty", "environment", "triton", "torch"} <= set(record.software)
    assert record.hardware["cpu_model"]
    assert len(record.settings["cores"]) == min(torch.get_num_threads(), record.hardware["usable_cores"])


# The command line


@pytest.mark.parametrize("pair", ["cifar-r56-r20", "imagenet-r34-r18", "imagenet-r50-r18"])
def test_a_pair_names_factors_and_head_alike(pair: str) -> None:
    assert SHAPES[pair].channels == HEADS[pair].factor
    assert SHAPES[pair].dims[2:] == (HEADS[pair].height, HEADS[pair].width)
