"""Which backends a test can name here, and outputs that start as NaN, so that an element nobody wrote is seen."""

import dataclasses
import itertools
from collections.abc import Iterator

import pytest
import torch

from ftfast.backends.triton import interpreting
from ftfast.dispatch import supports
from tests.processes.fork_server import Popen

CPU = torch.device("cpu")
GUARD, GUARD_BYTES = 0xA5, 256
pytest_plugins = ["tests.machine_code", "tests.stand_in_gpu.plugin"]


def kernel_backends() -> list[tuple[str, str]]:
    """The ``(backend, device)`` pairs with kernels of our own that can run in this process."""
    pairs = [("native", "cpu"), ("triton", "cpu")] if interpreting() else [("native", "cpu")]
    if torch.cuda.is_available() and not interpreting():
        pairs += [("native", "cuda"), ("triton", "cuda")]
    runnable = [pair for pair in pairs if supports(pair[0], torch.device(pair[1]), torch.float32, torch.float32).ok]
    return [pair for pair in runnable if pair[0] == "triton"] if interpreting() else runnable


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "backend" in metafunc.fixturenames:
        pairs = kernel_backends()
        none = [pytest.param("none", "cpu", marks=pytest.mark.skip("no backend with kernels of its own runs here"))]
        metafunc.parametrize(("backend", "device"), pairs or none, ids=["-".join(pair) for pair in pairs] or ["none"])


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items[:] = long_ones_first(items)
    for item in items:
        if item.get_closest_marker("cuda") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip("no CUDA device here"))


def long_ones_first(items: list[pytest.Item]) -> list[pytest.Item]:
    """In each half, of which xdist gives one to each of two processes: or one waits at the end for what the other does.

    A file's stay together, for the sake of its fixtures.
    """
    short, long = [], []
    for item in items:
        (long if item.get_closest_marker("slow") or item.get_closest_marker("process") else short).append(item)
    files = [list(of_file) for _, of_file in itertools.groupby(long, key=lambda item: item.path)]
    files.sort(key=len, reverse=True)
    first = list(itertools.chain(*files[0::2]))
    room = max(0, len(items) // 2 - len(first))
    return [*first, *short[:room], *itertools.chain(*files[1::2]), *short[room:]]


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """What is small gains nothing from a second one, which costs the process beside this one its core."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def forked(monkeypatch: pytest.MonkeyPatch) -> None:
    """What our own code starts in this process is forked where that can be."""
    monkeypatch.setattr("subprocess.Popen", Popen)


@pytest.fixture
def overflow_unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's interpreter looks for an overflow in all arithmetic of integers, which is half of its work.

    It does in the kernels' own tests, tests/*/test_*_triton.py, for every shape and layout of theirs.
    """
    if interpreting():
        from triton.runtime.interpreter import interpreter_builder

        unchecked = dataclasses.replace(interpreter_builder.options, sanitize_overflow=False)
        monkeypatch.setattr(interpreter_builder, "options", unchecked)


@pytest.fixture
def ieee_float32() -> Iterator[None]:
    """On a GPU torch's convolutions round the operands of float32 to TF32 unless they are told not to."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """torch.empty and torch.empty_like give NaN (the largest integer for integers).

    Around it lie guards, and a write beyond either end fails the test.
    """
    guards: list[torch.Tensor] = []

    def look() -> None:
        assert all(bool((guard == GUARD).all()) for guard in guards), "a kernel wrote beyond the memory of its result"
        guards.clear()

    for name in ("empty", "empty_like"):
        make = getattr(torch, name)

        def make_poisoned(*args: object, _make: object = make, **options: object) -> torch.Tensor:
            made = _make(*args, **options)  # type: ignore[operator]
            if made.layout == torch.strided and made.numel() and not options.get("out"):
                span = 1 + sum((size - 1) * step for size, step in zip(made.shape, made.stride(), strict=True))
                end = GUARD_BYTES + span * made.element_size()
                memory = torch.full((end + GUARD_BYTES + -end % 16,), GUARD, dtype=torch.uint8, device=made.device)
                guards.extend((memory[:GUARD_BYTES], memory[end:]))
                made = (
                    memory[: end + -end % 16]
                    .view(made.dtype)[GUARD_BYTES // made.element_size() :]
                    .as_strided(made.shape, made.stride(), GUARD_BYTES // made.element_size())
                )
            if len(guards) > 1000:
                look()
            return made.fill_(float("nan") if made.is_floating_point() else torch.iinfo(made.dtype).max)

        monkeypatch.setattr(torch, name, make_poisoned)
    yield
    look()
