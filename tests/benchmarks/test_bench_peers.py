"""The loss's peers: each judged by its own formula, absent ones named and not failed, memory and work counted."""

import sys
from collections.abc import Iterator
from io import StringIO
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import Tensor

import ftfast
from bench import peers
from bench.__main__ import main
from bench.harness import records
from bench.harness.clocks import CpuClock
from bench.harness.gate import BACKWARD, FORWARD, FORWARD_BACKWARD, Judge
from bench.harness.measuring import Plan, measure_group
from bench.harness.records import Row, Timing
from bench.harness.registry import Settings
from bench.kernels import ft_loss
from bench.kernels.loss_cases import LossCases, factors, saved_for_backward
from bench.results import tables
from bench.shapes import parse_shape

CPU = torch.device("cpu")
TINY = parse_shape("16x8x4x4")
RUNNABLE = ("eager", "autocast", "torchdistill", "repdistiller", "mmrazor")
PLAN = Plan(blocks=1, warmups=1, calls=2, block_seconds=0.0)


@pytest.fixture(autouse=True)
def _same_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def settings(names: tuple[str, ...], dtype: torch.dtype = torch.float32) -> Settings:
    return Settings(CPU, (dtype,), (TINY,), ("channels_last",), names, PLAN)


def built(name: str) -> peers.Loss:
    if name == "torchdistill":
        pytest.importorskip("torchdistill")
    return peers.PEERS[name].build()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("name", RUNNABLE)
def test_every_peer_passes_the_gate_of_its_own_formula(name: str, layout: str, dtype: torch.dtype) -> None:
    peer, loss = peers.PEERS[name], built(name)
    if not peer.takes(dtype):
        pytest.skip("the same as another peer on wider factors")
    student, teacher = factors(TINY, dtype, layout, CPU, seed=1)
    judge = Judge(student, teacher, 0, peer.formula)
    verdict = judge(loss, student, teacher, rounds_throughout=dtype.itemsize < 4)
    assert verdict.passed, verdict.reason

    def longer(student_factor: Tensor, teacher_factor: Tensor) -> Tensor:
        value = loss(student_factor, teacher_factor)
        return 1.2 * value - 0.2 * value.detach()

    assert not judge(longer, student, teacher, rounds_throughout=dtype.itemsize < 4).passed
    assert not judge(lambda a, b: 1.2 * loss(a, b), student, teacher, rounds_throughout=dtype.itemsize < 4).passed


@pytest.mark.parametrize("name", RUNNABLE)
def test_only_another_formula_fails_the_official_gate(name: str) -> None:
    peer = peers.PEERS[name]
    student, teacher = factors(TINY, torch.float32, "nchw", CPU, seed=1)
    loss = peers.official_formula if name == "autocast" else built(name)
    is_official = Judge(student, teacher, 0)(loss, student, teacher).passed
    assert is_official == ("other_formula" not in peer.details())


def test_the_attention_form_ignores_channels_and_the_official_does_not() -> None:
    student, teacher = (factor.detach().double() for factor in factors(TINY, torch.float64, "nchw", CPU, seed=1))
    shuffled = student.roll(1, dims=1)
    attention = peers.repdistiller_formula(student, teacher)
    assert (peers.repdistiller_formula(shuffled, teacher) / attention - 1).abs() < 1e-12
    official = peers.official_formula(student, teacher)
    assert (peers.official_formula(shuffled, teacher) / official - 1).abs() > 1e-4
    by_hand = torch.stack([(factor**2).mean(1).flatten(1) for factor in (student, teacher)])
    by_hand = by_hand / by_hand.square().sum(2, keepdim=True).sqrt()
    assert (attention / (by_hand[0] - by_hand[1]).abs().mean() - 1).abs() < 1e-12


def test_float16_is_judged_at_sizes_beyond_its_range() -> None:
    # The upstream gradient of N*D = 131,072 is no float16.
    student, teacher = factors(parse_shape("64x32x8x8"), torch.float16, "nchw", CPU, seed=1)
    verdict = Judge(student, teacher, 0)(peers.official_formula, student, teacher, rounds_throughout=True)
    assert verdict.passed, verdict.reason


def missing_torchdistill(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchdistill.losses.mid_level", None)
    monkeypatch.setitem(sys.modules, "torchdistill", None)


def test_an_absent_peer_is_a_row_with_the_way_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    missing_torchdistill(monkeypatch)
    steps: list[str] = []
    chosen = settings(("eager", "torchdistill"))
    rows = ft_loss.run(chosen, steps.append)
    assert len(steps) == ft_loss.BENCH.size(chosen)
    (absent,) = [row for row in rows if row.candidate == "torchdistill"]
    assert absent.reason == "not installed: pip install torchdistill"
    assert absent.details["not_installed"]
    assert not any(row.reason for row in rows if row is not absent)


@pytest.mark.parametrize(("named", "status"), [([], 0), (["--peers", "eager,torchdistill"], 1)])
def test_an_absent_peer_fails_the_run_only_when_named(
    named: list[str], status: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    missing_torchdistill(monkeypatch)
    # All that --quick takes by default, without waiting for a compiler.
    monkeypatch.setattr("bench.arguments.QUICK_PEERS", ("eager", "torchdistill"))
    out = tmp_path / "record.json"
    arguments = ["ft_loss", "--quick", "--shapes", str(TINY), "--layouts", "nchw", "--threads", "1", *named]
    assert main([*arguments, "--out", str(out)]) == status
    assert [row.candidate for row in records.load(out).rows if row.reason] == ["torchdistill"]


def test_autocast_is_measured_on_16_bits_alone() -> None:
    for dtype, present in ((torch.float32, False), (torch.bfloat16, True)):
        chosen = settings(("eager", "autocast"), dtype)
        titles = {candidate.name for group in ft_loss.groups(chosen) for candidate in group.build()}
        assert ("eager, autocast" in titles) == present


# Works


def test_backward_is_timed_without_its_forward() -> None:
    calls = {FORWARD: 0, BACKWARD: 0}

    class Counted(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, student: Tensor, teacher: Tensor) -> Tensor:
            calls[FORWARD] += 1
            return student.new_zeros(())

        @staticmethod
        def backward(ctx: object, *upstream: Tensor) -> tuple[Tensor, None]:
            calls[BACKWARD] += 1
            return torch.zeros(TINY.dims), None

    cases = LossCases(TINY, torch.float32, "nchw", CPU, seed=0)
    (candidate,) = cases.entries("counted", Counted.apply, works=(BACKWARD,), formula=None)
    for repetition in range(1, 4):
        candidate.prepare()
        assert calls == {FORWARD: repetition, BACKWARD: repetition - 1}
        candidate.step()
        assert calls == {FORWARD: repetition, BACKWARD: repetition}
        assert cases.student.grad is not None


def test_every_loss_has_forward_backward_and_both() -> None:
    (group,) = ft_loss.groups(settings(("eager", "repdistiller")))
    rows = measure_group(group, CpuClock(), PLAN)
    for name in (peers.EAGER, "RepDistiller", ft_loss.OURS):
        found = {row.work: row for row in rows if row.candidate == name}
        assert set(found) == {FORWARD, BACKWARD, FORWARD_BACKWARD}
        assert all(row.timing for row in found.values())
        counted = [found[work].details.get("flops") for work in (FORWARD, BACKWARD, FORWARD_BACKWARD)]
        expected = [None] * 3 if name == "RepDistiller" else [count * TINY.numel for count in (9, 6, 15)]
        assert counted == expected


def test_backward_has_no_traffic_where_forward_wrote_the_gradient() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        (group,) = ft_loss.groups(settings((), dtype))
        (backward,) = [c for c in group.build() if c.name == ft_loss.OURS and c.work == BACKWARD]
        written = backward.details["gradient_in_forward"]
        assert backward.least_bytes == (None if written else 3 * TINY.numel * dtype.itemsize)


# Memory


def saved(loss: peers.Loss, dtype: torch.dtype) -> tuple[int, int]:
    student, teacher = factors(TINY, dtype, "nchw", CPU, seed=1)
    found = saved_for_backward(loss, student, teacher)
    return found["saved_bytes"], found["saved_beyond_factors_bytes"]


def test_saved_bytes_count_each_storage_once_and_the_factors_apart() -> None:
    factor = 4 * TINY.numel
    assert saved(lambda student, teacher: (student * teacher).sum(), torch.float32) == (factor, 0)
    assert saved(lambda student, teacher: (student * (2 * teacher)).sum(), torch.float32) == (factor, factor)
    halves = saved(lambda student, teacher: (student[:8] * teacher[:8] * teacher[8:]).sum(), torch.float32)
    assert halves == (factor, 0)


def test_what_a_context_keeps_as_an_attribute_is_counted() -> None:
    assert saved(peers.yardstick, torch.float32) == (4 * TINY.numel, 4 * TINY.numel)


def test_ours_keeps_the_factors_their_gradient_and_a_few_scalars() -> None:
    factor = TINY.numel * 2
    for _ in range(2):  # until its forward pass expects the upstream gradient, and writes the gradient
        factors = torch.randn(2, *TINY.dims, dtype=torch.bfloat16)
        ftfast.FTLoss()(factors[0].requires_grad_(), factors[1]).backward()
    total, beyond = saved(ftfast.FTLoss(), torch.bfloat16)
    eager_total, eager_beyond = saved(peers.official_formula, torch.bfloat16)
    assert 3 * factor <= total <= 3 * factor + 100 * TINY.samples
    assert beyond <= factor + 100 * TINY.samples
    # It keeps the difference of the directions, which is no factor.
    assert eager_beyond >= factor
    assert eager_total >= eager_beyond + factor


# Tables


def rows_of_peers() -> list[Row]:
    def timing(ms: float) -> Timing:
        return Timing(ms, ms, ms, 2, [ms])

    details = {"saved_bytes": 3 * 2**20, "saved_beyond_factors_bytes": 2**20, "peak_bytes": 5 * 2**20}

    def row(name: str, ms: float) -> Row:
        marked = {**details, "other_formula": True} if name == "RepDistiller" else details
        return Row("ft_loss", "a group", name, FORWARD_BACKWARD, timing(ms), details=marked)

    found = [row(name, ms) for name, ms in TIMES.items()]
    absent = Row("ft_loss", "a group", "torchdistill", FORWARD_BACKWARD, None, reason="not installed: pip install x")
    return [*found, absent]


TIMES = {peers.EAGER: 4.0, ft_loss.OURS: 0.5, "mmrazor": 3.0, "RepDistiller": 2.0}


def test_readme_shows_further_peers_where_a_record_has_them() -> None:
    text = tables.peers_markdown(rows_of_peers(), ft_loss.OURS, ["a group"])
    lines = text.splitlines()
    assert lines[0] == "| factors, dtype, layout | torchdistill | RepDistiller (other formula) | mmrazor |"
    assert lines[2] == "| a group | not installed: pip install x | 2.00 ms, 4.00x | 3.00 ms, 6.00x |"
    assert tables.peers_markdown(rows_of_peers()[:2], ft_loss.OURS, ["a group"]) == ""


def test_terminal_shows_memory_and_which_formula_differs() -> None:
    page = StringIO()
    console = Console(width=140, file=page)
    for table in tables.comparison_tables(rows_of_peers()):
        console.print(table)
    text = page.getvalue()
    assert "RepDistiller*" in text
    assert "* other formula" in text
    assert "not installed: pip install x" in text
    (line,) = [line for line in text.splitlines() if line.strip().startswith("mmrazor")]
    assert line.split()[-3:] == ["3.00", "1.00", "5.00"]
