"""The steps, in order of value.

What some took on an H200 with 16 cores: build 20 s, bench_store 42 s, bench_step above 62 s, both preset runs together
above 130 s, tests_triton 120 s with 12 processes, tests_cuda 40 s, convolutions 19 s, matmuls 7 s, tune above 50 s.
"""

import glob
import importlib.util
import sys
from dataclasses import dataclass, field
from pathlib import Path

PYTHON = sys.executable
# Where a small step finds nothing else to do.
TINY_HEAD = "2x8+8:4x2x2"
TINY_BENCH = ("--quick", "--blocks", "1", "--threads", "1", "--peers", "none")
# Tuning for the fastest of torch.compile's kernels takes minutes.
FEW_PEERS = ("--peers", "eager,compile")
MOST_TESTS_AT_ONCE = 12
TINY_SIZES = ("--heads", TINY_HEAD, "--shapes", "2x4x2x2", "--layouts", "nchw", "--dtype", "bfloat16")


@dataclass(frozen=True)
class Step:
    """One command.

    Attributes:
        command: in the checkout's root.
        small: its smallest form, which runs on the CPU; None where it needs a GPU.
        needs: Python packages without which it is left out.
        small_needs: the same, in the smallest form alone.
        probe: a command that must succeed, else the step is left out.
        environment: in addition to the runner's.
        small_environment: further, in the smallest form.
    """

    name: str
    command: list[str]
    small: list[str] | None = None
    needs: tuple[str, ...] = ()
    small_needs: tuple[str, ...] = ()
    probe: list[str] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)
    small_environment: dict[str, str] = field(default_factory=dict)


def _module(name: str, *arguments: str) -> list[str]:
    return [PYTHON, "-m", name, *arguments]


def _tests(name: str, files: list[str], *options: str) -> Step:
    command = _module("pytest", "-q", "-ra", "--continue-on-collection-errors", "-p", "no:cacheprovider", *options)
    # Most of the time goes into compiling, of which every core does its own.
    beside = ["-n", str(MOST_TESTS_AT_ONCE)] if importlib.util.find_spec("xdist") else []
    return Step(name, [*command, *beside, *files], needs=("pytest",))


def _bench(results: Path, name: str, *benches: str, options: tuple[str, ...] = ()) -> Step:
    record = str(results / f"{name}.json")
    return Step(
        name,
        _module("bench", *benches, *options, "--out", record),
        _module("bench", *benches, *TINY_BENCH, *TINY_SIZES, "--out", record),
        needs=("rich",),
        # Compiling for the peers is off the clock on a GPU.
        environment={"TORCHINDUCTOR_COMPILE_THREADS": "8"},
        small_environment={"TORCHINDUCTOR_COMPILE_THREADS": "1"},
    )


def _whole_run(results: Path, name: str, *words: str) -> Step:
    """Benches that have tests of their own on the CPU."""
    return Step(
        name,
        _module("bench", *words, "--out", str(results / f"{name}.json")),
        needs=("rich", "torchvision"),
        environment={"TORCHINDUCTOR_COMPILE_THREADS": "8"},
    )


def steps(results: Path) -> list[Step]:
    """All of them; what they find goes into the folder ``results``."""

    def measured(name: str, script: str, small_environment: dict[str, str] | None = None) -> Step:
        out = ("--out", str(results / f"{name}.jsonl"))
        return Step(
            name,
            _module(f"bench.on_gpu.{script}", *out),
            _module(f"bench.on_gpu.{script}", *out, "--small"),
            small_environment=small_environment or {},
        )

    interpreted = {"TRITON_INTERPRET": "1"}
    tune = _module("ftfast", "tune")
    return [
        Step("build", [PYTHON, "setup.py", "build_ext", "--inplace"], [PYTHON, "setup.py", "--version"]),
        # A loader each, so that a limit that ends one leaves the other's record.
        _whole_run(results, "bench_preset_synthetic", "preset_run", "--loaders", "synthetic"),
        _whole_run(results, "bench_preset_gpu", "preset_run", "--loaders", "gpu"),
        _whole_run(results, "bench_step", "distill_step", "--blocks", "2"),
        _whole_run(results, "bench_store", "store", "--blocks", "2"),
        _whole_run(results, "bench_loaders", "loaders"),
        _bench(results, "bench_head", "ft_head", options=("--heads", "cifar-r56-r20,imagenet-r34-r18", *FEW_PEERS)),
        _bench(results, "bench_loss", "ft_loss", options=FEW_PEERS),
        _tests("tests_triton", sorted(glob.glob("tests/test_*_triton.py"))),
        _tests("tests_cuda", ["tests"], "-m", "cuda"),
        _tests("tests_backends", ["tests"], "-k", "triton-cuda"),
        measured("convolutions", "convolutions"),
        measured("matmuls", "matmuls", interpreted),
        measured("repeats", "repeats", interpreted),
        Step(
            "tune",
            tune,
            [*tune, TINY_HEAD, "--device", "cpu", "--seconds", "0.01"],
            needs=("rich",),
            probe=[*tune, "--help"],
            small_needs=("ftfast._C",),
        ),
        _bench(results, "bench_convolutions", "conv3x3"),
        _bench(
            results,
            "bench_large_head",
            "ft_head",
            options=("--heads", "imagenet-r101-r50-stage3,imagenet-r101-r50", "--blocks", "3", *FEW_PEERS),
        ),
    ]
