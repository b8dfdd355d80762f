"""The store bench: steps from a store are the official step, and the reader's rows say how many factors a second."""

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace

import pytest
import torch

from bench.harness.measuring import QUICK_PLAN
from bench.harness.records import Row, Timing
from bench.harness.registry import Settings, discover
from bench.training import step_peers, store, store_files

CPU = torch.device("cpu")
SETTINGS = Settings(CPU, (torch.float32,), (), (), (), replace(QUICK_PLAN, blocks=1, warmups=0, calls=2), quick=True)
SMALL = step_peers.Pair("resnet8", "resnet8", 16, 8, 10)


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setattr(store, "CIFAR", SMALL)
    monkeypatch.setattr(store, "QUICK_BATCH", 8)
    monkeypatch.setattr(store, "QUICK_FILE_BYTES", 8 << 20)
    yield
    torch.set_num_threads(threads)


def test_steps_and_reader_are_measured_behind_their_gates() -> None:
    told: list[str] = []
    rows = store.run(SETTINGS, told.append)
    assert len(told) == store.size(SETTINGS)
    assert [row.reason for row in rows] == [""] * 8
    assert [row.candidate for row in rows if row.gate is not None] == [store.OFFICIAL, store.LIVE, store.STORED]
    assert len(list(store.show(rows))) == 2
    lines = [" ".join(line) for _, members in store._by_group(rows) for line in store._lines(members, "cpu")]
    assert [line.count("factors/s") for line in lines] == [0, 0, 0, 0, 1, 2, 2, 1]


def test_factors_of_another_batch_get_no_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "factors_of", lambda with_: store_files.factors_of(with_).flip(0))
    rows = {row.candidate: row for row in store.run(SETTINGS, lambda _: None)}
    assert "gate is red" in rows[store.STORED].reason
    assert rows[store.LIVE].reason == ""


def test_rows_of_the_repeated_batch_are_the_batch() -> None:
    with_ = step_peers.Operands(SMALL, 8, CPU, 0)
    with ExitStack() as stack:
        found = store.candidates(SETTINGS, SMALL, 8, stack)
        assert [candidate.name for candidate in found][-1] == store.READING
        expected, read = found[-1].step(), found[-1].step()
        assert torch.equal(expected[0], read[0])  # type: ignore[index]
        assert read[0].shape == (8, with_.paraphraser().factor_channels, 2, 2)  # type: ignore[index]


def test_it_is_registered_and_its_block_shows_the_ratios() -> None:
    assert discover()["store"] is store.BENCH
    group = store.group_name(step_peers.CIFAR, store.BATCH)
    rows = [
        Row("store", group, name, "step", Timing(ms, ms, ms, 10, [ms]), details={"dims": [128, 3, 32, 32]})
        for name, ms in ((store.OFFICIAL, 600.0), (store.LIVE, 150.0), (store.STORED, 100.0))
    ]
    assert store.speedup(rows, store.OFFICIAL) == pytest.approx(6.0)
    assert store.speedup(rows, store.NO_TEACHER) is None
    assert "not measured yet" in store.markdown({})
