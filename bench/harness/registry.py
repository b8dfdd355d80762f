"""Which benches there are: every module of the packages below that defines ``BENCH``."""

import pkgutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType

import torch
from rich.table import Table

from bench.harness.measuring import Plan
from bench.harness.records import Row
from bench.shapes import FactorShape
from ftfast.commands.tune.heads import HeadShape

PACKAGES = ("bench.kernels", "bench.machine_code", "bench.training")


@dataclass(frozen=True)
class Settings:
    """What the command line chose.

    Attributes:
        device: where the factors are.
        dtypes, shapes, layouts: measured in every combination; layouts are ``"nchw"`` and ``"channels_last"``.
        peers: names in :data:`bench.peers.PEERS`.
        plan: how long to measure.
        heads, head_dtypes: the same for benches of whole heads and of their convolutions.
        quick: a look is wanted, not figures.
        steps: of a student in preset_run, None for its own number.
        loaders: of preset_run and loaders, empty for their own.
        pairs: of networks in distill_step, ``"cifar"`` and ``"imagenet"``.
    """

    device: torch.device
    dtypes: tuple[torch.dtype, ...]
    shapes: tuple[FactorShape, ...]
    layouts: tuple[str, ...]
    peers: tuple[str, ...]
    plan: Plan
    heads: tuple[HeadShape, ...] = ()
    head_dtypes: tuple[torch.dtype, ...] = (torch.bfloat16,)
    quick: bool = False
    steps: int | None = None
    loaders: tuple[str, ...] = ()
    pairs: tuple[str, ...] = ("cifar", "imagenet")


def runs_anywhere(_: "Settings") -> str:
    """A bench that refuses no settings."""
    return ""


@dataclass(frozen=True)
class Bench:
    """What a bench module registers.

    Attributes:
        summary: one line for ``--list``.
        size: how many times ``run`` calls ``advance``, for the progress bar.
        run: measures; ``advance`` takes what is being measured now.
        tables: the rows of this bench for the terminal.
        markdown: the block of README and docs from a picture's link and the newest record by device type, ``"cpu"`` and
            ``"cuda"``; many take ``brief`` too, for the first table alone.
        formula: what the rows' ``least_bytes`` counts.
        refuses: why it cannot run here, one sentence, or nothing.
    """

    summary: str
    size: Callable[[Settings], int]
    run: Callable[[Settings, Callable[[str], None]], list[Row]]
    tables: Callable[[list[Row]], Iterable[Table]]
    markdown: Callable[..., str]
    formula: str = ""
    refuses: Callable[[Settings], str] = runs_anywhere


def bench_modules() -> dict[str, ModuleType]:
    """The modules of benches by their own name, in its order."""
    found = {}
    for package in PACKAGES:
        for module_info in pkgutil.iter_modules(import_module(package).__path__):
            if module_info.ispkg or module_info.name.startswith(("_", "test_")):
                continue
            module = import_module(f"{package}.{module_info.name}")
            if isinstance(getattr(module, "BENCH", None), Bench):
                found[module_info.name] = module
    return dict(sorted(found.items()))


def discover() -> dict[str, Bench]:
    """The benches by their module's name."""
    return {name: module.BENCH for name, module in bench_modules().items()}
