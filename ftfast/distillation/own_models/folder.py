"""The folder of one training of models of one's own: who may write there, and whether it is the same training."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ftfast.distillation.runtime import files
from ftfast.errors import RunFolderError, shown

FORMAT = "ftfast-own-models"
VERSION = 1
SETTINGS_FILE = "settings.json"
# A process that was killed may take moments to go, and one that was told to stop saves first.
LOCK_SECONDS = 10.0


@contextmanager
def own_folder(path: Path, settings: dict[str, Any], *, resume: bool) -> Iterator[Path]:
    """A folder for this training alone: a new one, or with ``resume`` that of one with the same settings.

    Args:
        settings: plain values as JSON keeps them.

    Raises:
        RunFolderError: the folder holds something else, cannot be written, or another process writes to it; or the
            training to be resumed has other settings, of which the message names the first.
    """
    _check(path, settings, resume=resume)
    try:
        with files.locked(path, LOCK_SECONDS if resume else 0.0):
            _check(path, settings, resume=resume)  # another process may have filled it meanwhile
            if not (path / SETTINGS_FILE).exists():
                files.write_json(path / SETTINGS_FILE, {"format": FORMAT, "version": VERSION, **settings})
            yield path
    except BlockingIOError:
        raise RunFolderError(f"output {path} is written to by another process; wait for it or give another.") from None


def _check(path: Path, settings: dict[str, Any], *, resume: bool) -> None:
    nearest = next((parent for parent in (path, *path.absolute().parents) if parent.exists()), Path("/"))
    if not nearest.is_dir():
        raise RunFolderError(f"output {path} cannot be a folder, since {nearest} is a file; give another.")
    entries = path.iterdir() if path.exists() else ()
    found = [entry for entry in entries if entry.name != files.LOCK and not files.is_left_over(entry)]
    if not found:
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
