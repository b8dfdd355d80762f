"""The folder of one training of models of one's own: who may write there, and whether it is the same training."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from ftfast.distillation.runtime import files
from ftfast.distillation.runtime.output_folder import check_can_be_written, own_folder
from ftfast.errors import RunFolderError, shown

FORMAT = "ftfast-own-models"
VERSION = 1
SETTINGS_FILE = "settings.json"
_ADVICE = "give another"


@contextmanager
def training_folder(path: Path, settings: dict[str, Any], *, resume: bool) -> Iterator[Path]:
    """A folder for this training alone: a new one, or with ``resume`` that of one with the same settings.

    Args:
        settings: plain values as JSON keeps them.

    Raises:
        RunFolderError: the folder holds something else, cannot be written, or another process writes to it; or the
            training to be resumed has other settings, of which the message names the first.
    """

    def begin() -> None:
        if not (path / SETTINGS_FILE).exists():
            files.write_json(path / SETTINGS_FILE, {"format": FORMAT, "version": VERSION, **settings})

    check = partial(_check, path, settings, resume=resume)
    with own_folder(path, check, begin, resume=resume, advice=_ADVICE):
        yield path


def _check(path: Path, settings: dict[str, Any], *, resume: bool) -> None:
    check_can_be_written(path, _ADVICE)
    if not files.contents(path):
        return
    kept = _read(path / SETTINGS_FILE)
    if not resume or kept is None:
        held = "other files; give another" if kept is None else "a training; give resume=True to go on, or another"
        raise RunFolderError(f"output {path} holds {held}.")
    for name, value in {"format": FORMAT, "version": VERSION, **settings}.items():
        if kept.get(name) != value:
            raise RunFolderError(
                f"{name} is {shown(repr(value))}, and the training to be resumed in {path} has "
                f"{shown(repr(kept.get(name)))}; give it as it was, or another output."
            )


def _read(path: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None
