"""``pytest bench``: the quick cases of every registered bench, under pytest-benchmark.

A bench whose module yields groups has a case for each candidate; of another the whole quick run is one case, unless
tests/benchmarks runs it whole already.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from bench.harness.gate import Candidate
from bench.harness.measuring import QUICK_PLAN
from bench.harness.registry import Bench, Settings, bench_modules
from bench.shapes import QUICK_HEADS, QUICK_SHAPES, SHAPES
from ftfast.commands.tune.heads import HEADS
from tests.processes.fork_server import Popen

SETTINGS = Settings(
    device=torch.device("cpu"),
    dtypes=(torch.float32, torch.bfloat16),
    shapes=tuple(SHAPES[name] for name in QUICK_SHAPES),
    layouts=("nchw", "channels_last"),
    peers=("eager", "autocast", "repdistiller", "mmrazor"),
    plan=QUICK_PLAN,
    heads=tuple(HEADS[name] for name in QUICK_HEADS),
    head_dtypes=(torch.float32, torch.bfloat16),
    quick=True,
)
MODULES = {name: module for name, module in bench_modules().items() if not module.BENCH.refuses(SETTINGS)}
GROUPED = [name for name in MODULES if hasattr(MODULES[name], "groups")]
# Their whole runs are in tests/benchmarks, of smaller networks or with a closer look at what comes of them.
RUN_IN_TESTS = {"distill_step", "import_time", "loaders", "preset_run", "resources", "store"}
WHOLE = [name for name in MODULES if name not in GROUPED and name not in RUN_IN_TESTS]


def cases() -> Iterator[Any]:
    for name in GROUPED:
        for group in MODULES[name].groups(SETTINGS):
            for candidate in group.build():
                yield pytest.param(
                    group.name, candidate, id=f"{name}: {group.name}, {candidate.name}, {candidate.work}"
                )


@pytest.mark.parametrize(("group", "candidate"), list(cases()))
def test_candidate(benchmark: Any, group: str, candidate: Candidate) -> None:
    if candidate.gate is not None:
        gate = candidate.gate()
        assert gate.passed, gate.reason
    benchmark.group = f"{group}, {candidate.work}"
    benchmark.pedantic(candidate.step, setup=candidate.prepare, rounds=5, warmup_rounds=1)


@pytest.mark.slow
@pytest.mark.parametrize("name", WHOLE)
def test_whole_bench(benchmark: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("subprocess.Popen", Popen)
    bench: Bench = MODULES[name].BENCH
    benchmark.group = name
    rows = benchmark.pedantic(bench.run, args=(SETTINGS, lambda _: None), rounds=1)
    assert rows
    assert not [row.reason for row in rows if row.reason]
