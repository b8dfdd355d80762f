"""The steps, in order of value."""

import glob
import sys
from dataclasses import dataclass, field
from pathlib import Path

PYTHON = sys.executable
# Where a small step finds nothing else to do.
TINY_HEAD = "2x8+8:4x2x2"
TINY_BENCH = ("--quick", "--blocks", "1", "--threads", "1", "--peers", "none")
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
    return Step(name, [*command, *files], needs=("pytest",))


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
        _bench(results, "bench_quick", "ft_loss", "conv3x3", "ft_head", options=("--quick",)),
        _bench(results, "bench_head", "ft_head", options=("--heads", "cifar-r56-r20,imagenet-r34-r18")),
        Step(
            "bench_loaders",
            _module("bench", "loaders", "preset_run", "--out", str(results / "bench_loaders.json")),
            needs=("rich", "torchvision"),
            environment={"TORCHINDUCTOR_COMPILE_THREADS": "8"},
        ),
        _bench(results, "bench_convolutions", "conv3x3"),
        _bench(results, "bench_loss", "ft_loss"),
        _bench(
            results,
            "bench_large_head",
            "ft_head",
            options=("--heads", "imagenet-r101-r50-stage3,imagenet-r101-r50", "--blocks", "3"),
        ),
    ]
