"""The run folder: where each result lies, and who may write there."""

import dataclasses
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from ftfast.distillation.runtime import files
from ftfast.distillation.runtime.output_folder import check_can_be_written, own_folder
from ftfast.distillation.settings.run_settings import Settings
from ftfast.errors import RunFolderError, SettingsError

_LAUNCH = ".launch"
_ADVICE = "choose another --output"


class RunFolder:
    """The paths of one run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.settings = path / "settings.json"
        self.results = path / "results.json"
        self.selection = path / "selection.json"
        self.teacher = path / "teacher"
        self.paraphraser = path / "paraphraser"
        self.tensorboard = path / "tensorboard"

    def control(self, name: str) -> Path:
        return self.path / "controls" / name

    def student(self, method: str, seed: int) -> Path:
        return self.path / "students" / method / f"seed{seed}"


@contextmanager
def open_run_folder(
    path: Path, settings: Settings, *, resume: bool, agents: Iterable[bytes] = ()
) -> Iterator[RunFolder]:
    """A folder for this run alone: a new one, or with ``resume`` that of a run with the same settings.

    Args:
        agents: stand for what started the run's processes, and are kept for :func:`is_of_one`.

    Raises:
        RunFolderError: the folder holds something else, cannot be written, or another process writes to it.
        SettingsError: the run to be resumed has other settings; the message names the first that differs.
    """
    folder = RunFolder(path)

    def begin() -> None:
        files.write_json(path / _LAUNCH, [agent.hex() for agent in agents])
        if not folder.settings.exists():
            files.write_json(folder.settings, settings.to_json())

    check = partial(check_run_folder, path, settings, resume=resume)
    with own_folder(path, check, begin, resume=resume, advice=_ADVICE):
        yield folder


def is_of_one(path: Path, agents: Iterable[bytes]) -> bool:
    """Whether the run in a folder was begun, or gone on with, by processes that one of these started too."""
    try:
        kept = json.loads((path / _LAUNCH).read_text())
    except (OSError, ValueError):
        return False
    return isinstance(kept, list) and any(agent.hex() in kept for agent in agents)


def check_run_folder(path: Path, settings: Settings, *, resume: bool) -> None:
    """Raises as :func:`open_run_folder` does, and writes nothing."""
    check_can_be_written(path, _ADVICE)
    found = files.contents(path, _LAUNCH)
    holds_run = RunFolder(path).settings.is_file()
    if found and not resume:
        held = "a run already; continue it with --resume" if holds_run else "other files"
        raise RunFolderError(f"output {path} holds {held}{' or' if holds_run else ';'} choose another --output.")
    if found and not holds_run:
        raise RunFolderError(f"output {path} holds no run to resume, and other files; choose another --output.")
    if holds_run:
        _compare(read_settings(RunFolder(path).settings), settings)


def read_settings(path: Path) -> Settings:
    """The settings of a run, from its settings.json.

    Raises:
        RunFolderError: not there, or not as they were written.
        SettingsError: of a newer version, or with a field that this one does not know.
    """
    try:
        return Settings.from_json(json.loads(path.read_text()))
    except (OSError, ValueError) as error:
        if isinstance(error, SettingsError):
            raise
        raise RunFolderError(f"{path} cannot be read, so its folder is none of a run; give another.") from None


def _compare(kept: Settings, asked: Settings) -> None:
    before, now = kept.to_json(), asked.to_json()
    free = {item.name for item in dataclasses.fields(Settings) if item.metadata["free"]}
    for name, value in before.items():
        if now[name] != value and name not in free:
            raise SettingsError(
                f"{name} is {_shown(now[name])}, and the run to be resumed has {_shown(value)}; "
                f"give --{name.replace('_', '-')} as it was, or choose another --output."
            )


def _shown(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)
