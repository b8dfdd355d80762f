"""Stand-ins for wandb, trackio and mlflow in this process, which keep what they are told, by run and step.

They know of each library what it takes, and nothing of how it works.
"""

import sys
from collections import defaultdict
from collections.abc import Mapping
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest


class Recording:
    """What one library was told.

    Attributes:
        runs: what each run was told, in the order in which it was: a step and its numbers, or what else it was.
        settings: of each run.
        ended: the runs that are over, each time.
        fails_from: the call from which on nothing is taken any more.
    """

    def __init__(self) -> None:
        self.runs: dict[str, list[tuple[int, dict[str, Any]]]] = defaultdict(list)
        self.settings: dict[str, dict[str, Any]] = {}
        self.parents: dict[str, str] = {}
        self.ended: list[tuple[str, Any]] = []
        self.tables: dict[str, Any] = {}
        self.calls, self.fails_from = 0, float("inf")

    def add(self, run: str, values: Mapping[str, Any], step: int) -> None:
        self.calls += 1
        if self.calls >= self.fails_from:
            raise ConnectionError("no route to the host\nand a page more")
        print("said by a library")  # on standard output, as some do
        self.runs[run].append((step, dict(values)))


def put_in_place(monkeypatch: pytest.MonkeyPatch) -> dict[str, Recording]:
    """The three libraries by name."""
    found = {name: Recording() for name in ("wandb", "trackio", "mlflow")}
    for name, build in (("wandb", _wandb), ("trackio", _trackio), ("mlflow", _mlflow)):
        for module in build(found[name]):
            module.__spec__ = ModuleSpec(module.__name__, None)
            monkeypatch.setitem(sys.modules, module.__name__, module)
    return found


def _module(name: str, **content: Any) -> ModuleType:
    module = ModuleType(name)
    vars(module).update(content)
    return module


def _wandb(kept: Recording) -> list[ModuleType]:
    def init(
        *,
        project: str,
        group: str,
        name: str,
        id: str,  # noqa: A002
        resume: str,
        config: dict[str, Any],
        settings: Any,
    ) -> Any:
        assert (project, resume) == ("ftfast", "allow")
        assert not set(id) & set("/\\#?%:+")
        title = group if name == group else f"{group}/{name}"
        kept.settings[title] = config
        last = max((step for step, _ in kept.runs[title]), default=0)

        def log(values: dict[str, Any]) -> None:
            if "results" in values:
                kept.tables[title] = values.pop("results")
            else:
                step = values.pop("step")
                assert step >= last
                kept.add(title, values, step)

        def finish(exit_code: int) -> None:
            kept.ended.append((title, exit_code == 0))

        return SimpleNamespace(log=log, finish=finish, define_metric=lambda name, step_metric: None)

    return [_module("wandb", init=init, Settings=SimpleNamespace, Table=lambda columns, data: (columns, data))]


def _trackio(kept: Recording) -> list[ModuleType]:
    opened: list[str] = []

    def init(*, project: str, group: str, name: str, resume: str, config: dict[str, Any], embed: bool) -> Any:
        assert (project, resume, embed) == ("ftfast", "allow", False)
        assert name.startswith(group)
        opened.append(name)
        kept.settings[name] = config

        def log(values: dict[str, Any], step: int | None = None) -> None:
            if "results" in values:
                kept.tables[name] = values.pop("results")
            else:
                assert step is not None
                kept.add(name, values, step)

        return SimpleNamespace(log=log)

    def finish() -> None:
        kept.ended.append((opened.pop(), True))

    return [_module("trackio", init=init, finish=finish, Table=lambda columns, data: (columns, data))]


def _mlflow(kept: Recording) -> list[ModuleType]:
    experiments: dict[str, str] = {}

    class MlflowClient:
        def get_experiment_by_name(self, name: str) -> Any:
            return SimpleNamespace(experiment_id=experiments[name]) if name in experiments else None

        def create_experiment(self, name: str) -> str:
            return experiments.setdefault(name, "1")

        def search_runs(self, experiment_ids: list[str], filter_string: str, max_results: int) -> list[Any]:
            assert experiment_ids == ["1"]
            assert filter_string.startswith("attributes.run_name = '")
            name = filter_string.split("'")[1]
            return [SimpleNamespace(info=SimpleNamespace(run_id=name))] if name in kept.settings else []

        def create_run(self, experiment_id: str, run_name: str, tags: dict[str, str]) -> Any:
            kept.settings[run_name] = {}
            kept.parents[run_name] = tags.get("mlflow.parentRunId", "")
            return SimpleNamespace(info=SimpleNamespace(run_id=run_name))

        def update_run(self, run_id: str, status: str) -> None:
            assert run_id in kept.settings
            assert status == "RUNNING"

        def log_batch(self, run_id: str, metrics: Any = (), params: Any = ()) -> None:
            assert len(params) <= 100
            for param in params:
                assert param.key not in kept.settings[run_id]  # it is never another value
                kept.settings[run_id][param.key] = param.value
            if metrics:
                kept.add(run_id, {metric.key: metric.value for metric in metrics}, metrics[0].step)

        def log_text(self, run_id: str, text: str, artifact_file: str) -> None:
            kept.tables[run_id] = text

        def set_terminated(self, run_id: str, status: str) -> None:
            kept.ended.append((run_id, status == "FINISHED"))

    def metric(key: str, value: float, timestamp: int, step: int) -> Any:
        return SimpleNamespace(key=key, value=value, step=step)

    def param(key: str, value: str) -> Any:
        return SimpleNamespace(key=key, value=value)

    entities = _module("mlflow.entities", Metric=metric, Param=param)
    return [_module("mlflow", MlflowClient=MlflowClient, entities=entities), entities]
