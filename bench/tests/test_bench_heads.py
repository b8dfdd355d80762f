"""What the figures of the benches ft_head and conv3x3 rest on: gates, counts, and the text made from records."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from bench.__main__ import main
from bench.harness.measuring import QUICK_PLAN
from bench.harness.records import Record, Row, Timing
from bench.harness.registry import Settings
from bench.kernels import conv3x3, ft_head
from bench.kernels.layers import Operands
from bench.results import throughput
from ftfast.commands.tune.heads import parse_head

SETTINGS = Settings(
    device=torch.device("cpu"),
    dtypes=(),
    shapes=(),
    layouts=(),
    peers=("eager",),
    plan=QUICK_PLAN,
    heads=(parse_head("16x24:16x5x5"),),
    head_dtypes=(torch.float32, torch.bfloat16),
    quick=True,
)


def wrong_heads(right: ft_head.Loss) -> dict[str, ft_head.Loss]:
    def longer_gradient(student: Tensor, teacher: Tensor) -> Tensor:
        loss = right(student, teacher)
        return 1.03 * loss - 0.03 * loss.detach()

    def without_the_last_row(student: Tensor, teacher: Tensor) -> Tensor:
        return right(student[:-1], teacher[:-1]) * ((student.shape[0] - 1) / student.shape[0])

    return {
        "scaled": lambda student, teacher: 1.03 * right(student, teacher),
        "longer gradient": longer_gradient,
        "without the last row": without_the_last_row,
        "no number": lambda student, teacher: right(student, teacher) * float("nan"),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gate_tells_a_wrong_head(dtype: torch.dtype) -> None:
    with_ = ft_head.operands(parse_head("16x24+12:16x5x5"), dtype, torch.device("cpu"), seed=1)
    judge = ft_head.HeadJudge(with_, seed=2)
    assert judge(ft_head.eager_head(with_), is_eager=True).passed
    right = ft_head.our_head(with_)
    verdict = judge(right)
    assert verdict.passed, verdict.reason
    for name, wrong in wrong_heads(right).items():
        verdict = judge(wrong)
        assert not verdict.passed, name
        assert "is off by" in verdict.reason


def test_float32_shows_a_thousandth() -> None:
    with_ = ft_head.operands(parse_head("16x24:16x5x5"), torch.float32, torch.device("cpu"), seed=1)
    right = ft_head.our_head(with_)
    assert not ft_head.HeadJudge(with_, seed=2)(lambda student, teacher: 1.001 * right(student, teacher)).passed


def test_no_figure_behind_a_red_gate(monkeypatch: pytest.MonkeyPatch) -> None:
    right = ft_head.our_head
    monkeypatch.setattr(ft_head, "our_head", lambda with_: wrong_heads(right(with_))["scaled"])
    rows = ft_head.run(SETTINGS, lambda _: None)
    ours = [row for row in rows if row.candidate == ft_head.OURS]
    assert len(ours) == 4
    assert all(row.timing is None and "gate is red" in row.reason for row in ours)
    assert all(row.timing is not None for row in rows if row not in ours)


def test_the_gate_tells_a_wrong_convolution(monkeypatch: pytest.MonkeyPatch) -> None:
    right = conv3x3.library_steps

    def off_by_little(with_: Operands) -> dict[str, Callable[[], Tensor]]:
        # The float64 reference is right, and what is measured against it is not.
        factor = 1.0 if with_.x.dtype == torch.float64 else 1.01
        return {work: lambda step=step: factor * step() for work, step in right(with_).items()}  # type: ignore[misc]

    monkeypatch.setattr(conv3x3, "library_steps", off_by_little)
    rows = conv3x3.run(SETTINGS, lambda _: None)
    library = [row for row in rows if row.candidate == conv3x3.LIBRARY]
    assert library
    assert all(row.timing is None and "the length of the" in row.reason for row in library)


# What is counted


@pytest.mark.parametrize("module", [ft_head, conv3x3])
def test_the_progress_bar_ends_when_the_run_does(module: Any) -> None:
    steps: list[str] = []
    module.run(SETTINGS, steps.append)
    assert len(steps) == module.size(SETTINGS)


def test_flops_are_those_that_torch_counts() -> None:
    shape = parse_head("3x8+12:4x5x7")
    with_ = ft_head.operands(shape, torch.float32, torch.device("cpu"), seed=0)
    run = ft_head.eager_head(with_)
    for work in (ft_head.FORWARD, ft_head.FORWARD_BACKWARD):
        with FlopCounterMode(display=False) as counter:
            loss = run(with_.student, with_.teacher)
            if work == ft_head.FORWARD_BACKWARD:
                loss.backward()
        assert counter.get_total_flops() == ft_head.flops(shape, work)


def test_saved_bytes_count_a_storage_once_and_no_parameter() -> None:
    with_ = ft_head.operands(parse_head("2x4:4x3x3"), torch.float32, torch.device("cpu"), seed=0)
    squared = with_.student.nbytes

    def loss(student: Tensor, teacher: Tensor) -> Tensor:
        halves = [half * half for half in student.chunk(2, 1)]
        scaled = student * next(with_.head.translator.parameters())[0, 0, 0, 0]
        return halves[0].sum() + halves[1].sum() + scaled.sum()

    assert ft_head.saved_bytes(loss, with_) == squared


def timed(candidate: str, work: str, ms: float, least_bytes: int | None = None, **details: Any) -> Row:
    timing = Timing(median=ms, p20=ms, p80=ms, calls=10, block_medians=[ms])
    return Row("ft_head", "group", candidate, work, timing, least_bytes, details=details)


def test_figures_are_taken_within_a_group_and_a_graph_against_graphs() -> None:
    work = "forward+backward"
    rows = [
        timed("eager", work, 6.0, 10**6, flops=2 * 10**9),
        timed("ftfast", work, 2.0, 10**6, flops=2 * 10**9),
        timed("eager, CUDA graph", work, 3.0, 10**6, flops=2 * 10**9),
        timed("ftfast, CUDA graph", work, 1.0, 10**6, flops=2 * 10**9),
        timed("matmul", "matmul", 1.0, flops=4 * 10**9),
        timed("copy", "copy", 1.0, 10**6),
    ]
    found = {figures.row.candidate: figures for figures in throughput.derive(rows, ["eager", "torch.compile"])}
    assert found["ftfast"].tflops == pytest.approx(1.0)
    assert found["ftfast"].percent_of_matmul == pytest.approx(25.0)
    assert found["ftfast"].speedups == {"eager": pytest.approx(3.0), "torch.compile": None}
    assert found["ftfast, CUDA graph"].speedups["eager"] == pytest.approx(3.0)
    # The bytes take longer than the FLOPs would.
    assert found["ftfast"].floor_ms == pytest.approx(1.0)
    assert throughput.derive(rows[:5], [])[0].floor_ms == pytest.approx(0.5)


def test_markdown_comes_from_a_record_alone() -> None:
    work = "forward+backward"
    rows = [
        timed(ft_head.OURS, work, 2.0, flops=2 * 10**9),
        timed("eager", work, 6.0, flops=2 * 10**9),
        timed("matmul", "matmul", 1.0, flops=4 * 10**9),
    ]
    record = Record(
        created="2026-01-02T03:04:05+00:00",
        hardware={"cpu": "a processor", "device": "cpu"},
        software={"torch": "2.0", "revision": None, "dirty": None},
        settings={"threads": 2},
        rows=rows,
    )
    text = ft_head.markdown({"cpu": ("", record)})
    missing = "not measured yet"
    assert f"| group | 6.00 ms | {missing} | {missing} | 2.00 ms | 3.00 | {missing} | 25.0 |" in text
    assert "CUDA GPU: not measured yet." in text
    assert "CPU: not measured yet." in ft_head.markdown({})


@pytest.mark.parametrize("text", ["2x8:4x2x2", "2x8->4x2x2", "2x8+8:4x2x2"])
def test_a_head_has_one_name_however_it_is_written(text: str) -> None:
    assert parse_head(text) == ("2x8->4x2x2", 2, 8, 8, 4, 2, 2)
    assert str(parse_head("2x8+6:4x3x2")) == "2x8+6->4x3x2"


@pytest.mark.parametrize("heads", ["3x4", "0x8:4x2x2", "2x8:4x2", "nobody"])
def test_a_head_that_is_none_is_refused_in_one_sentence(heads: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["ft_head", "--heads", heads])
    assert stop.value.code == 2
    error = capsys.readouterr().err.strip().rpartition("error: ")[2]
    assert heads in error
    assert "\n" not in error
