"""``pytest bench``: the cases of bench/ft_loss.py on a small shape, under pytest-benchmark."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from bench import ft_loss
from bench.candidates import Candidate
from bench.measuring import QUICK_PLAN
from bench.registry import Settings
from bench.shapes import QUICK_SHAPES, SHAPES

SETTINGS = Settings(
    device=torch.device("cpu"),
    dtypes=(torch.float32, torch.bfloat16),
    shapes=tuple(SHAPES[name] for name in QUICK_SHAPES),
    layouts=("nchw", "channels_last"),
    peers=("eager",),
    plan=QUICK_PLAN,
)


def cases() -> Iterator[Any]:
    for group in ft_loss.groups(SETTINGS):
        for candidate in group.build():
            yield pytest.param(group.name, candidate, id=f"{group.name}, {candidate.name}, {candidate.work}")


@pytest.mark.parametrize(("group", "candidate"), list(cases()))
def test_ft_loss(benchmark: Any, group: str, candidate: Candidate) -> None:
    if candidate.gate is not None:
        gate = candidate.gate()
        assert gate.passed, gate.reason
    benchmark.group = f"{group}, {candidate.work}"
    benchmark.pedantic(candidate.step, setup=candidate.prepare, rounds=10, warmup_rounds=2)
