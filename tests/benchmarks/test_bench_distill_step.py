"""The step bench: every way does the same step, and a way that does another one or cannot run gets no figure."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from bench.harness.measuring import QUICK_PLAN
from bench.harness.records import Row, Timing
from bench.harness.registry import Settings, discover
from bench.training import distill_step, step_peers

CPU = torch.device("cpu")
PLAN = replace(QUICK_PLAN, blocks=1, warmups=0, calls=2)
WAYS = tuple(distill_step.WAYS)


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setattr(distill_step, "CIFAR", step_peers.Pair("resnet8", "resnet8", 16, 8, 10))
    monkeypatch.setattr(distill_step, "QUICK_BATCH", 8)
    yield
    torch.set_num_threads(threads)


def measured() -> dict[str, Row]:
    settings = Settings(CPU, (torch.float32,), (), (), (), PLAN, quick=True)
    told: list[str] = []
    rows = distill_step.run(settings, told.append)
    assert len(told) == distill_step.size(settings)
    return {row.candidate: row for row in rows}


def test_every_way_passes_its_gate_and_is_timed() -> None:
    rows = measured()
    assert tuple(rows) == WAYS
    for name, row in rows.items():
        if name == distill_step.TORCHDISTILL and row.timing is None:
            assert "ModuleNotFoundError" in row.reason  # it is no dependency
            continue
        assert row.reason == ""
        assert row.timing is not None
        assert (row.gate is None) == (name == distill_step.NO_TEACHER)
    assert "folded" in rows[distill_step.OURS].details["teacher_done"]
    assert distill_step.OURS in str(next(iter(distill_step.show(list(rows.values())))).columns[0]._cells)


def test_a_step_with_another_loss_gets_no_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(distill_step.WAYS, distill_step.OURS, lambda with_: step_peers.ours(with_, "none"))
    row = measured()[distill_step.OURS]
    assert row.timing is None
    assert "gate is red" in row.reason


def test_a_step_with_a_gradient_that_is_too_long_gets_no_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    def longer(with_: step_peers.Operands) -> step_peers.Step:
        step = step_peers.ours(with_, "ft")
        for parameter in step.student.parameters():
            parameter.register_hook(lambda gradient: 1.1 * gradient)
        return step

    monkeypatch.setitem(distill_step.WAYS, distill_step.OURS, longer)
    assert "length of the student's gradient" in measured()[distill_step.OURS].reason


def test_a_way_that_cannot_be_built_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(_: step_peers.Operands) -> step_peers.Step:
        raise ImportError("no such package")

    monkeypatch.setitem(distill_step.WAYS, distill_step.TORCHDISTILL, missing)
    rows = measured()
    assert "no such package" in rows[distill_step.TORCHDISTILL].reason
    assert rows[distill_step.OURS].timing is not None


def test_it_is_registered_and_its_block_shows_the_ratios() -> None:
    assert discover()["distill_step"] is distill_step.BENCH
    group = distill_step.group_name(step_peers.CIFAR, distill_step.BATCH)
    rows = [
        Row("distill_step", group, name, "step", Timing(ms, ms, ms, 10, [ms]), details={"dims": [128, 3, 32, 32]})
        for name, ms in ((distill_step.OFFICIAL, 600.0), (distill_step.OURS, 100.0))
    ]
    assert distill_step.speedup(rows, distill_step.OFFICIAL) == pytest.approx(6.0)
    assert distill_step.speedup(rows, distill_step.TORCHDISTILL) is None
    assert "not measured yet" in distill_step.markdown({})
