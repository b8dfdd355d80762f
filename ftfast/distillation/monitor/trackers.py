"""Who is told of a run's figures, by name: TensorBoard, Weights & Biases, Trackio, MLflow, one or several.

Each training is a tracked run of its own, so that methods and seeds lie over one another in the libraries' pictures;
the run as a whole is one more, with the settings and in the end the table.
"""

import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple
from uuid import uuid4

from ftfast.distillation.monitor.epochs import Epoch
from ftfast.distillation.monitor.log_files import STEPS
from ftfast.distillation.monitor.tracker_libraries import LibraryRun, Mlflow, Named, TensorBoard, Trackio, Wandb
from ftfast.distillation.runtime import files
from ftfast.errors import RunFolderError, SettingsError, printable, shown

FILE = "trackers.json"


class Library(NamedTuple):
    """How a library's runs are opened, what has to be installed, and whether it replaces what is told once more."""

    run: type[LibraryRun]
    package: str
    extra: str
    replaces: bool = False


LIBRARIES = {
    "tensorboard": Library(TensorBoard, "tensorboard", "distill", replaces=True),
    "wandb": Library(Wandb, "wandb", "track"),
    "trackio": Library(Trackio, "trackio", "track"),
    "mlflow": Library(Mlflow, "mlflow", "track"),
}
DEFAULT = "tensorboard"
_Act = Callable[[LibraryRun], None]


def tracker_names(text: str) -> tuple[str, ...]:
    """The names in a text such as ``"tensorboard,wandb"``, all of them installed; of an empty one, none.

    Raises:
        SettingsError: an unknown name, one twice, or a library that is not installed.
    """
    names = tuple(word.strip() for word in text.split(",")) if text.strip() else ()
    for name in names:
        if name not in LIBRARIES or names.count(name) > 1:
            raise SettingsError(f"track is {text!r}; it takes some of {', '.join(LIBRARIES)}, each once.")
        if find_spec(LIBRARIES[name].package) is None:
            library = LIBRARIES[name]
            raise SettingsError(
                f"track is {text!r}, and {library.package} is not installed; pip install {library.package}, or "
                f"'ftfast[{library.extra}]'."
            )
    return names


class Trackers:
    """The libraries that are told of one run; one that fails is named once, and the run goes on without it.

    A run that goes on is the same one to them: its name is kept in the run folder, with the last step of which they
    were told, so that none is told twice. TensorBoard replaces such steps.

    Args:
        names: of :data:`LIBRARIES`; none in processes that do not speak.
        folder: of the run.
        say: takes a line.
    """

    def __init__(self, names: Sequence[str], folder: Path, say: Callable[[str], None] = lambda _: None) -> None:
        self._names, self._folder, self.say = list(names), folder, say
        self._settings: dict[str, Any] = {}
        self._kept: dict[str, Any] = {}

    def begin(self, settings: Mapping[str, Any]) -> None:
        """Tells the settings of the run, before anything is computed.

        Raises:
            SettingsError: a library that cannot be told anything.
            RunFolderError: what the folder keeps is not as it was written.
        """
        if not self._names:
            return
        self._settings = dict(settings)
        self._kept = self._read()
        for name in self._names:
            try:
                with redirect_stdout(sys.stderr):
                    self._open(name, "", self._settings).end(is_whole=False)
            except Exception as error:
                raise SettingsError(
                    f"track has {name}, which cannot be told of this run: {_reason(error)}; mend that, or leave {name} "
                    "out, and resume the run."
                ) from None
        self._write()

    def finish(self, headings: Sequence[str], rows: Sequence[Sequence[str]], figures: Mapping[str, float]) -> None:
        """Tells the table of the run, which is whole, and the figures in it by name."""
        runs = self._opened("", self._settings)
        self._tell(runs, lambda run: run.add_table(headings, rows, figures))
        self._tell(runs, lambda run: run.end(is_whole=True))

    @contextmanager
    def training(self, title: str, described: Mapping[str, Any]) -> Iterator["TrackedTraining"]:
        """A training of the run; what describes it is told with the settings.

        Args:
            title: such as ``students/ft/seed0``.
        """
        runs = self._opened(title, {**self._settings, **described, "training": title})
        is_whole = False
        try:
            yield TrackedTraining(self, title, runs)
            is_whole = True
        finally:
            self._tell(runs, lambda run: run.end(is_whole=is_whole))

    def tell_once(self, title: str, kind: str, step: int, runs: dict[str, LibraryRun], act: _Act) -> None:
        """Tells of a step, those that replace nothing only if they have not been told of it or a later one."""
        told = self._kept.setdefault("told", {}).setdefault(title, {})
        is_new = step > told.get(kind, 0)
        if is_new:
            told[kind] = step
            self._write()  # first, so that a kill costs a step rather than showing it twice
        self._tell({name: run for name, run in runs.items() if is_new or LIBRARIES[name].replaces}, act)

    def _opened(self, title: str, settings: Mapping[str, Any]) -> dict[str, LibraryRun]:
        runs: dict[str, LibraryRun] = {}
        for name in list(self._names):
            with self._survived(name):
                runs[name] = self._open(name, title, settings)
        return runs

    def _open(self, name: str, title: str, settings: Mapping[str, Any]) -> LibraryRun:
        named = Named(self._kept["name"], title, self._folder, self.say)
        return LIBRARIES[name].run(named, {setting: _written(value) for setting, value in settings.items()})

    def _tell(self, runs: Mapping[str, LibraryRun], act: _Act) -> None:
        for name, run in runs.items():
            if name in self._names:
                with self._survived(name):
                    act(run)

    @contextmanager
    def _survived(self, name: str) -> Iterator[None]:
        try:
            with redirect_stdout(sys.stderr):  # standard output is for results
                yield
        except Exception as error:  # whatever a library or its network may raise
            self._names.remove(name)
            self.say(f"warning: {name} is told nothing more, since it fails: {_reason(error)}")

    def _read(self) -> dict[str, Any]:
        path = self._folder / FILE
        if not path.exists():
            folder = re.sub(r"[^\w.-]", "-", self._folder.absolute().name)[:40]
            return {"name": f"{folder}-{uuid4().hex[:6]}", "told": {}}
        with suppress(OSError, ValueError, TypeError, AttributeError, LookupError):
            kept = json.loads(path.read_text())
            numbers = [step for steps in kept["told"].values() for step in steps.values()]
            if re.fullmatch(r"[\w.-]+", kept["name"]) and all(isinstance(number, int) for number in numbers):
                return dict(kept)
        raise RunFolderError(f"{path} is not as it was written; remove it to be told of as a new run.")

    def _write(self) -> None:
        if any(not LIBRARIES[name].replaces for name in self._names):
            with suppress(OSError):  # a full disk, which other files tell of
                files.write_json(self._folder / FILE, self._kept)


class TrackedTraining:
    """One training as all libraries have it."""

    def __init__(self, trackers: Trackers, title: str, runs: dict[str, LibraryRun]) -> None:
        self._trackers, self._title, self._runs = trackers, title, runs

    def add_epoch(self, record: Epoch, step: int) -> None:
        """An epoch's losses, accuracies in percent and images a second; it ended with that step of the training."""
        values = {f"loss/{name}": value for name, value in record.losses.items()}
        accuracies = {"accuracy/test": record.accuracy, "accuracy/test top 5": record.top5_accuracy}
        values |= {name: value for name, value in accuracies.items() if value is not None}
        values["images per second"] = record.images / record.seconds
        self._add("epochs", record.epoch, lambda run: run.add_epoch(values, record.epoch, step))

    def add_step(self, values: Mapping[str, float], step: int, first_step: int) -> None:
        """Numbers by name of the steps up to that one; ``first_step`` is the first that this process makes."""
        named = {f"{STEPS}/{name}": value for name, value in values.items()}
        self._add("steps", step, lambda run: run.add_step(named, step, first_step))

    def _add(self, kind: str, step: int, act: _Act) -> None:
        if self._runs:
            self._trackers.tell_once(self._title, kind, step, self._runs, act)


def _written(value: Any) -> Any:
    return printable(value) if isinstance(value, str) else value


def _reason(error: Exception) -> str:
    """The first line of what it says, on one line."""
    return shown((str(error).strip() or type(error).__name__).partition("\n")[0].rstrip("."))
