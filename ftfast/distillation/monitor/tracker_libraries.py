"""A tracked run of each library, by its own API: its settings when it is opened, figures by step, a table, its end.

Where the figures go, and as whom, is what the library's own environment variables and files say. None is imported
before it is asked for.
"""

import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from ftfast.distillation.monitor.log_files import STEPS, Events
from ftfast.distillation.monitor.markdown import markdown_table

PROJECT = "ftfast"  # of which the libraries' variables name another
_PARAMS_AT_ONCE, _LONGEST_PARAM = 100, 6000  # of MLflow
_PATIENCE_SECONDS = 120.0  # with what is still to be sent at a run's end


@dataclass(frozen=True)
class Named:
    """A tracked run.

    Attributes:
        group: stands for the run folder, wherever it lies.
        title: of a training, such as ``students/ft/seed0``; empty for the run as a whole.
        folder: for what is kept there.
        say: takes a line where that cannot be.
    """

    group: str
    title: str
    folder: Path
    say: Callable[[str], None]

    @property
    def full(self) -> str:
        """The only one of its name."""
        return f"{self.group}/{self.title}" if self.title else self.group


class LibraryRun(Protocol):
    """One run of a library, opened anew or gone on with; whatever these raise, the training goes on."""

    def __init__(self, named: Named, settings: Mapping[str, Any]) -> None: ...

    def add_epoch(self, values: Mapping[str, float], epoch: int, step: int) -> None:
        """Figures of an epoch, which ends with that step of the training."""

    def add_step(self, values: Mapping[str, float], step: int, first_step: int) -> None:
        """Figures of steps up to that one; ``first_step`` is the first that this process told of."""

    def add_table(self, headings: Sequence[str], rows: Sequence[Sequence[str]], figures: Mapping[str, float]) -> None:
        """A table of words, and the figures in it."""

    def end(self, *, is_whole: bool) -> None:
        """Nothing comes after it in this process; a run that is not whole may be gone on with."""


class TensorBoard:
    """Event files, with the epochs and the steps of a training in folders of their own."""

    def __init__(self, named: Named, settings: Mapping[str, Any]) -> None:
        root, title = named.folder / "tensorboard", named.title or "run"
        self._epochs = Events(root, title, named.say)
        self._steps = Events(root, f"{title}/{STEPS}", named.say)
        if not named.title:
            shown = [(name, str(value)) for name, value in settings.items()]
            self._epochs.add_text("settings", _in_markdown(("setting", "value"), shown))

    def add_epoch(self, values: Mapping[str, float], epoch: int, step: int) -> None:
        self._epochs.add(values, epoch)

    def add_step(self, values: Mapping[str, float], step: int, first_step: int) -> None:
        self._steps.add(values, step, first_step)

    def add_table(self, headings: Sequence[str], rows: Sequence[Sequence[str]], figures: Mapping[str, float]) -> None:
        self._epochs.add_text("results", _in_markdown(headings, rows))

    def end(self, *, is_whole: bool) -> None:
        pass


class _OneAxis:
    """Epochs are told of at their last step, since a run has one axis."""

    def add(self, values: Mapping[str, float], step: int) -> None:
        raise NotImplementedError

    def add_epoch(self, values: Mapping[str, float], epoch: int, step: int) -> None:
        self.add({**values, "epoch": epoch}, step)

    def add_step(self, values: Mapping[str, float], step: int, first_step: int) -> None:
        self.add(values, step)


class Wandb(_OneAxis):
    """Weights & Biases; a run folder is a group of runs."""

    def __init__(self, named: Named, settings: Mapping[str, Any]) -> None:
        import wandb

        self._table = wandb.Table
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            group=named.group,
            name=named.title or named.group,
            id=re.sub(r"[^\w.-]", "-", named.full),
            resume="allow",
            config=dict(settings),
            settings=wandb.Settings(quiet=True, finish_timeout=_PATIENCE_SECONDS, finish_timeout_raises=True),
        )
        # A run that goes on counts its own steps from where it was, and would lose what is told of those before.
        self._run.define_metric("*", step_metric="step")

    def add(self, values: Mapping[str, float], step: int) -> None:
        self._run.log({**values, "step": step})

    def add_table(self, headings: Sequence[str], rows: Sequence[Sequence[str]], figures: Mapping[str, float]) -> None:
        self._run.log({"results": self._table(columns=list(headings), data=[list(row) for row in rows]), **figures})

    def end(self, *, is_whole: bool) -> None:
        self._run.finish(exit_code=0 if is_whole else 1)


class Trackio(_OneAxis):
    """Trackio; a run folder is a group of runs."""

    def __init__(self, named: Named, settings: Mapping[str, Any]) -> None:
        import trackio

        self._library = trackio
        self._run = trackio.init(
            project=os.environ.get("TRACKIO_PROJECT", PROJECT),
            group=named.group,
            name=named.full,
            resume="allow",
            config=dict(settings),
            embed=False,
        )

    def add(self, values: Mapping[str, float], step: int) -> None:
        self._run.log(dict(values), step=step)

    def add_table(self, headings: Sequence[str], rows: Sequence[Sequence[str]], figures: Mapping[str, float]) -> None:
        table = self._library.Table(columns=list(headings), data=[list(row) for row in rows])
        self._run.log({"results": table, **figures})

    def end(self, *, is_whole: bool) -> None:
        self._library.finish()


class Mlflow(_OneAxis):
    """MLflow; a run folder is a run with its trainings as children."""

    def __init__(self, named: Named, settings: Mapping[str, Any]) -> None:
        # A server that is gone would hold the training for minutes.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param

        self._client, self._metric = MlflowClient(), Metric
        project = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        experiment = self._client.get_experiment_by_name(project)
        self._experiment = self._client.create_experiment(project) if experiment is None else experiment.experiment_id
        known = self._find(named.full)
        if known is not None:
            self._id = known
            self._client.update_run(known, status="RUNNING")
            return
        parent = self._find(named.group) if named.title else None
        tags = {} if parent is None else {"mlflow.parentRunId": parent}
        self._id = self._client.create_run(self._experiment, run_name=named.full, tags=tags).info.run_id
        # Written once, since it refuses another value for a parameter that it has.
        params = [Param(name, str(value)[:_LONGEST_PARAM]) for name, value in settings.items()]
        for start in range(0, len(params), _PARAMS_AT_ONCE):
            self._client.log_batch(self._id, params=params[start : start + _PARAMS_AT_ONCE])

    def _find(self, name: str) -> str | None:
        asked = f"attributes.run_name = '{name}'"
        found = self._client.search_runs([self._experiment], asked, max_results=1)
        return found[0].info.run_id if found else None

    def add(self, values: Mapping[str, float], step: int) -> None:
        now = int(1000 * time.time())
        self._client.log_batch(self._id, [self._metric(name, value, now, step) for name, value in values.items()])

    def add_table(self, headings: Sequence[str], rows: Sequence[Sequence[str]], figures: Mapping[str, float]) -> None:
        self.add(figures, 0)
        self._client.log_text(self._id, _in_markdown(headings, rows), "results.md")

    def end(self, *, is_whole: bool) -> None:
        self._client.set_terminated(self._id, "FINISHED" if is_whole else "KILLED")


def _in_markdown(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(markdown_table(tuple(headings), map(tuple, rows)))
