"""The benches: no figure behind a red gate, records and pictures and README that agree."""

import json
import re
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import ftfast
from bench import peers, readme
from bench.__main__ import main
from bench.harness import records
from bench.harness.clocks import CpuClock
from bench.harness.gate import Candidate, Group, Judge
from bench.harness.measuring import QUICK_PLAN, Plan, measure_group
from bench.harness.records import Record, RecordError, Row, Timing
from bench.harness.registry import Settings
from bench.kernels import ft_loss, import_time, loss_cases
from bench.results import plots
from bench.results.tables import derive
from bench.shapes import parse_shape
from ftfast.backends.triton import interpreting
from ftfast.distillation.settings.run_settings import Settings as DistillSettings
from tests.processes.launching import python

CHECKOUT = Path(__file__).resolve().parents[2]
TINY = "6x8x4x4"


@pytest.fixture(autouse=True)
def _same_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def timing(ms: float) -> Timing:
    return Timing(median=ms, p20=0.9 * ms, p80=1.1 * ms, calls=20, block_medians=[ms, ms])


def made_up_record(ours_ms: float = 0.25, created: str = "2026-01-02T03:04:05+00:00") -> Record:
    """Yardstick 0.2 ms, eager 2 ms, ours, at the first shape of the README's table."""
    group = ft_loss.group_name(parse_shape("cifar-r56-r20"), torch.float32, "nchw")
    medians = {peers.EAGER: 2.0, peers.YARDSTICK: 0.2, ft_loss.OURS: ours_ms}
    rows = [
        Row("ft_loss", group, candidate, "forward+backward", timing(ms), least_bytes=3_000_000)
        for candidate, ms in medians.items()
    ]
    rows.append(Row("ft_loss", group, peers.COPY, "copy", timing(0.05), least_bytes=2_000_000))
    return Record(
        created=created,
        hardware={"cpu": "a processor", "device": "cpu"},
        software={"torch": "2.0", "revision": None, "dirty": None},
        settings={"threads": 2},
        rows=rows,
    )


# The gate


def scaled_loss(student: Tensor, teacher: Tensor) -> Tensor:
    return 1.001 * ftfast.ft_loss(student, teacher)


def scaled_gradient(student: Tensor, teacher: Tensor) -> Tensor:
    loss = ftfast.ft_loss(student, teacher)
    longer = 1.001 * loss
    return longer + (loss - longer).detach()


def last_row_skipped(student: Tensor, teacher: Tensor) -> Tensor:
    samples = student.shape[0]
    return ftfast.ft_loss(student[:-1], teacher[:-1]) * ((samples - 1) / samples)


def not_a_number(student: Tensor, teacher: Tensor) -> Tensor:
    return ftfast.ft_loss(student, teacher) * float("nan")


def factors(dtype: torch.dtype, shape: str = "16x8x4x4") -> list[Tensor]:
    return loss_cases.factors(parse_shape(shape), dtype, "nchw", torch.device("cpu"), seed=1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("wrong", [scaled_loss, scaled_gradient, last_row_skipped, not_a_number])
def test_gate_tells_right_from_wrong(dtype: torch.dtype, wrong: peers.Loss) -> None:
    student, teacher = factors(dtype)
    judge = Judge(student, teacher, seed=0)
    right = judge(ftfast.ft_loss, student, teacher)
    assert right.passed, right.reason
    verdict = judge(wrong, student, teacher)
    assert not verdict.passed
    assert "is off by" in verdict.reason


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gate_passes_the_official_formula_at_its_own_precision(dtype: torch.dtype) -> None:
    student, teacher = factors(dtype, "64x32x4x4")
    verdict = Judge(student, teacher, seed=0)(peers.official_formula, student, teacher, rounds_throughout=True)
    assert verdict.passed, verdict.reason


def test_no_figure_behind_a_red_gate(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    forward = ftfast.FTLoss.forward
    monkeypatch.setattr(ftfast.FTLoss, "forward", lambda *arguments: 1.001 * forward(*arguments))
    out = tmp_path / "record.json"
    status = main(["ft_loss", "--quick", "--shapes", TINY, "--peers", "none", "--threads", "1", "--out", str(out)])
    assert status == 1
    assert "gate is red: the loss is off by 1.0e-03" in capsys.readouterr().out
    record = records.load(out)
    ours = [row for row in record.rows if row.candidate.startswith(ft_loss.OURS)]
    assert ours
    assert all(row.timing is None and "gate is red" in row.reason for row in ours)
    assert all(figures.over_yardstick is None for figures in derive(ours))
    assert all(row.timing for row in record.rows if row.candidate in (peers.YARDSTICK, peers.COPY))


# Timing


def test_a_candidate_is_timed_in_blocks_of_its_own_and_without_its_preparation() -> None:
    calls: list[str] = []

    def candidate(name: str) -> Candidate:
        return Candidate(name, "work", step=lambda: calls.append(name), prepare=lambda: time.sleep(2e-3))

    names = ["a", "b", "c"]
    group = Group("bench", "group", {}, lambda: [candidate(name) for name in names])
    plan = Plan(blocks=3, warmups=4, calls=10, block_seconds=0.0, seed=5)
    before_blocks = len(names) * (1 + 3)
    rows = measure_group(group, CpuClock(), plan)
    blocks = [calls[at : at + 14] for at in range(before_blocks, len(calls), 14)]
    assert all(len(set(block)) == 1 for block in blocks)
    order = [block[0] for block in blocks]
    assert sorted(order) == sorted(3 * names)
    assert order != sorted(order)
    for row in rows:
        assert row.timing is not None
        assert row.timing.calls == 30
        assert row.timing.p20 <= row.timing.median <= row.timing.p80 < 1.0
    first_order = list(calls)
    calls.clear()
    measure_group(group, CpuClock(), plan)
    assert calls == first_order


def test_a_candidate_that_raises_leaves_the_others_their_figures() -> None:
    def broken() -> None:
        raise RuntimeError("no such kernel\nsecond line")

    candidates = [Candidate("broken", "work", broken), Candidate("whole", "work", lambda: None)]
    rows = measure_group(Group("bench", "group", {}, lambda: candidates), CpuClock(), QUICK_PLAN)
    assert [row.reason for row in rows] == ["it raises RuntimeError: no such kernel", ""]
    assert rows[0].timing is None
    assert rows[1].timing is not None


def test_a_group_that_cannot_be_built_gets_a_row_with_the_reason() -> None:
    def build() -> list[Candidate]:
        raise RuntimeError("not enough memory\nsecond line")

    (row,) = measure_group(Group("bench", "group", {"shape": "large"}, build), CpuClock(), QUICK_PLAN)
    assert row.timing is None
    assert row.reason == "it raises RuntimeError: not enough memory"
    assert row.details == {"shape": "large"}


def test_the_shape_of_the_digits_pair_is_that_of_its_factors() -> None:
    settings = DistillSettings()
    samples, channels, height, width = parse_shape("digits-r20-r8").dims
    assert samples == settings.batch_size
    assert channels * height * width == settings.factor_size()
    assert (channels, height, width) == (32, 2, 2)


def test_the_yardstick_copies_no_gradient() -> None:
    student, teacher = factors(torch.float32)
    loss = peers.yardstick(student, teacher)
    written: Any = loss.grad_fn
    address = written.gradient.data_ptr()
    loss.backward()
    assert student.grad is not None
    assert student.grad.data_ptr() == address
    assert torch.equal(student.grad, (student + teacher).detach())


def test_the_progress_bar_ends_when_the_run_does() -> None:
    shape = parse_shape(TINY)
    plan = Plan(blocks=1, warmups=1, calls=2, block_seconds=0.0)
    settings = Settings(torch.device("cpu"), (torch.float32,), (shape,), ("nchw", "channels_last"), ("eager",), plan)
    steps: list[str] = []
    ft_loss.BENCH.run(settings, steps.append)
    assert len(steps) == ft_loss.BENCH.size(settings)


# Records


def test_a_record_comes_back_as_it_was_written(tmp_path: Path) -> None:
    record = made_up_record()
    path = tmp_path / "record.json"
    records.save(record, path)
    assert records.load(path) == record
    assert records.load(path).digest == record.digest
    assert replace(record, created="2027").digest != record.digest
    assert [file.name for file in tmp_path.iterdir()] == ["record.json"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": records.VERSION + 1}, "update ftfast"),
        ({"version": "1"}, "version"),
        ({"schema": "another"}, "not a bench record"),
        ({"rows": [{"bench": "ft_loss"}]}, "damaged"),
        ({"rows": 3}, "damaged"),
        ({"of_a_later_time": 1}, "damaged"),
    ],
)
def test_a_record_of_another_make_is_refused(change: dict[str, Any], message: str) -> None:
    data = {**json.loads(made_up_record().to_json()), **change}
    with pytest.raises(RecordError, match=message):
        records.parse(json.dumps(data), "record.json")


@pytest.mark.parametrize("text", ["", "{", "[]", "null"])
def test_what_is_no_record_is_refused(text: str) -> None:
    with pytest.raises(RecordError, match=re.escape("record.json")):
        records.parse(text, "record.json")


def test_ratios_are_taken_within_a_group() -> None:
    found = {figures.row.candidate: figures for figures in derive(made_up_record(ours_ms=0.25).rows)}
    ours = found[ft_loss.OURS]
    assert ours.over_yardstick == pytest.approx(1.25)
    assert ours.speedup_over_eager == pytest.approx(8.0)
    assert ours.speedup_over_compile is None
    assert ours.row.gbps == pytest.approx(12.0)
    assert ours.percent_of_ceiling == pytest.approx(30.0)


# Pictures and README


def test_pictures_come_from_a_record_alone(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    records.save(made_up_record(), path)
    assert main(["plot", str(path)]) == 0
    svg, png = plots.picture_paths(path, "ft_loss")
    assert png.read_bytes().startswith(b"\x89PNG")
    first = svg.read_bytes()
    assert plots.digest_in(svg) == made_up_record().digest
    assert main(["plot", str(path)]) == 0
    assert svg.read_bytes() == first
    records.save(made_up_record(ours_ms=0.5), path)
    assert main(["plot", str(path)]) == 0
    assert svg.read_bytes() != first


def test_readme_is_written_from_records_and_checked_against_them(tmp_path: Path) -> None:
    folder, page = tmp_path / "records", tmp_path / "README.md"
    folder.mkdir()
    page.write_text("# before\n<!-- bench:ft_loss -->\n<!-- /bench -->\nafter\n")
    arguments = ["--page", str(page), "--records", str(folder)]

    assert readme.main([*arguments, "--check"]) == 1
    assert readme.main(arguments) == 0
    assert "CPU: not measured yet" in page.read_text()
    assert readme.main([*arguments, "--check"]) == 0

    records.save(made_up_record(), folder / "cpu.json")
    assert readme.main([*arguments, "--check"]) == 1
    assert readme.main(arguments) == 0
    text = page.read_text()
    assert "0.250 ms" in text
    assert "| 1.25 | 8.00 | not measured yet |" in text
    assert "not measured yet" in text
    assert "(records/cpu.ft_loss.svg)" in text
    assert text.startswith("# before\n")
    assert text.endswith("\nafter\n")
    assert readme.main([*arguments, "--check"]) == 0

    page.write_text(text.replace("0.250 ms", "0.249 ms"))
    assert readme.main([*arguments, "--check"]) == 1
    page.write_text(text)
    (folder / "cpu.ft_loss.svg").write_text("another picture")
    assert readme.main([*arguments, "--check"]) == 1


@pytest.mark.parametrize("names", ["az", "za"])
def test_readme_takes_the_newest_record(names: str, tmp_path: Path) -> None:
    records.save(made_up_record(0.25, "2026-01-02T00:00:00+00:00"), tmp_path / f"{names[0]}.json")
    records.save(made_up_record(0.75, "2026-03-02T00:00:00+00:00"), tmp_path / f"{names[1]}.json")
    text = readme.regenerate("<!-- bench:ft_loss -->\n<!-- /bench -->", tmp_path, tmp_path / "README.md")
    assert "0.750 ms" in text
    assert "0.250 ms" not in text


@pytest.mark.parametrize("text", ["no block", "<!-- bench:nothing -->\n<!-- /bench -->"])
def test_a_readme_without_a_known_block_is_refused(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "README.md"
    page.write_text(text)
    with pytest.raises(SystemExit) as stop:
        readme.main(["--page", str(page), "--records", str(tmp_path)])
    assert stop.value.code == 2
    assert str(page) in capsys.readouterr().err
    assert page.read_text() == text


# The command line


@pytest.mark.process
def test_quick_run_from_the_command_line_gives_a_valid_record(tmp_path: Path) -> None:
    out = tmp_path / "record.json"
    command = ["-m", "bench", "ft_loss", "import_time", "--quick", "--shapes", TINY]
    command += ["--layouts", "channels_last", "--dtype", "float32,bfloat16", "--threads", "1", "--json"]
    finished = python(*command, "--out", str(out))
    assert finished.returncode == 0, finished.stderr
    record = records.load(out)
    assert records.parse(finished.stdout, "stdout") == record
    assert record.settings["threads"] == 1
    assert record.hardware["cpu"]
    assert record.software["torch"] == torch.__version__
    assert any("not to be quoted" in note for note in record.notes)
    ours = {
        (row.details["dtype"], row.details["upstream"]) for row in record.rows if row.candidate.startswith("ftfast")
    }
    assert ours == {(dtype, upstream) for dtype in ("float32", "bfloat16") for upstream in (1.0, 512.0)}
    for row in record.rows:
        assert row.timing is not None
        assert row.timing.median > 0
        assert row.gate is None or row.gate["passed"]
    assert [row.candidate for row in record.of("import_time")] == list(import_time.STATEMENTS)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["nothing"], "nothing"),
        (["--shapes", "3x4"], "3x4"),
        (["--shapes", "0x1x1x1"], "0x1x1x1"),
        (["--dtype", "int8"], "int8"),
        (["--layouts", "nhwc"], "nhwc"),
        (["--peers", "someone"], "someone"),
        (["--threads", "0"], "0"),
        (["--blocks", "many"], "many"),
        (["--seed", "-1"], "-1"),
        (["--seed", "99999999999999999999"], "4294967296"),
        (["--out", "/no/such/folder/record.json"], "/no/such/folder"),
        (["plot", "/no/such/record.json"], "/no/such/record.json"),
        (["readme", "--page", "/no/such/README.md"], "/no/such/README.md"),
    ],
)
def test_bad_input_is_one_sentence(arguments: list[str], named: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    error = capsys.readouterr().err.strip().rpartition("error: ")[2]
    assert named in error
    assert "\n" not in error


@pytest.mark.parametrize(
    ("name", "message"), [("bogus", "backend is 'bogus'"), ("triton", 'backend "triton" cannot run')]
)
def test_a_backend_that_cannot_be_had_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str, message: str
) -> None:
    if name == "triton" and interpreting():
        pytest.skip("Triton's interpreter runs on the CPU")
    monkeypatch.setenv("FTFAST_BACKEND", name)
    with pytest.raises(SystemExit) as stop:
        main(["ft_loss", "--quick", "--device", "cpu"])
    assert stop.value.code == 2
    assert f"FTFAST_BACKEND cannot be met: {message}" in capsys.readouterr().err


@pytest.mark.parametrize("overwrite", [[], ["--overwrite"]])
def test_out_replaces_no_other_file(overwrite: list[str], tmp_path: Path) -> None:
    out = tmp_path / "notes.json"
    out.write_text("mine")
    with pytest.raises(SystemExit) as stop:
        main(["ft_loss", "--quick", "--out", str(out), *overwrite])
    assert stop.value.code == 2
    assert out.read_text() == "mine"


def test_out_replaces_a_record_only_when_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "record.json"
    records.save(made_up_record(), out)
    run = ["ft_loss", "--quick", "--shapes", TINY, "--layouts", "nchw", "--threads", "1", "--out", str(out)]
    with pytest.raises(SystemExit) as stop:
        main(run)
    assert stop.value.code == 2
    assert "--overwrite" in capsys.readouterr().err
    assert records.load(out) == made_up_record()
    assert main([*run, "--overwrite"]) == 0
    assert records.load(out).created != made_up_record().created


def test_closed_standard_output_is_told(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    assert main(["--list"]) == 0
    assert "python -m bench: warning: standard output is closed" in capsys.readouterr().err


def test_list_names_every_bench(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--list"]) == 0
    named = {line.split()[0] for line in capsys.readouterr().out.splitlines()}
    assert named >= {"ft_loss", "import_time"}
