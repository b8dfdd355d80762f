"""The mark ``stand_in_gpu``: such a test's function runs in a process that has a stand-in GPU, one for all of them."""

import importlib
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import pytest

from tests.stand_in_gpu import libraries
from tests.stand_in_gpu.build import CannotBuildError
from tests.stand_in_gpu.running import environment

LIMIT_SECONDS = 120
_processes: list[ProcessPoolExecutor] = []


def _process() -> ProcessPoolExecutor:
    """The process, begun where there is none yet."""
    if not _processes:
        given, before = environment(), dict(os.environ)
        spawn = multiprocessing.get_context("spawn")
        made = ProcessPoolExecutor(max_workers=1, mp_context=spawn, initializer=libraries.install)
        os.environ.update(given)  # the loader reads it before Python can
        try:
            made.submit(os.getpid).result(LIMIT_SECONDS)
        finally:
            os.environ.clear()
            os.environ.update(before)
        _processes.append(made)
    return _processes[0]


def _run(module: str, name: str, arguments: dict[str, Any]) -> str:
    """Why the test was skipped, or nothing."""
    try:
        getattr(importlib.import_module(module), name)(**arguments)
    except pytest.skip.Exception as skipped:  # neither travels between processes
        return str(skipped)
    except pytest.fail.Exception as failed:
        raise AssertionError(str(failed)) from None
    return ""


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    if pyfuncitem.get_closest_marker("stand_in_gpu") is None:
        return None
    arguments = {name: pyfuncitem.funcargs[name] for name in pyfuncitem._fixtureinfo.argnames}
    try:
        process = _process()
    except CannotBuildError as error:
        pytest.skip(f"there is no stand-in GPU: {error}")
    try:
        asked = process.submit(_run, pyfuncitem.module.__name__, pyfuncitem.originalname, arguments)
        skipped = asked.result(LIMIT_SECONDS)
    except BrokenProcessPool:
        _processes.clear()
        raise
    if skipped:
        pytest.skip(skipped)
    return True


def pytest_unconfigure() -> None:
    for process in _processes:
        process.shutdown()
