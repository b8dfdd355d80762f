"""Files that a run adds to while it goes, and which it can do without: a full disk is told of and does not end it."""

import json
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any


class AppendedFile:
    """A file that grows by whole pieces; where one cannot be written it is left out, and the next one is tried again.

    Args:
        path: made, with the folders above it, when the first piece is written.
        say: takes a line the first time that a piece cannot be written.
        named: what that line calls the file.
    """

    def __init__(self, path: Path, say: Callable[[str], None], named: Path | None = None) -> None:
        self._path, self._say, self._named = path, say, named or path
        self._has_warned = False

    def add(self, piece: bytes) -> bool:
        """Whether it was written."""
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            _append(self._path, piece)
        except OSError as error:
            if not self._has_warned:
                self._say(
                    f"warning: {self._named} cannot be written: {error.strerror or error}; the run goes on without it"
                )
            self._has_warned = True
            return False
        return True

    def cut_half_a_line(self) -> None:
        """What a kill left of a last line would spoil the next one."""
        with suppress(OSError):  # adding to it will say why
            if self._path.is_file():  # and no device, which may have no end
                content = self._path.read_bytes()
                if not content.endswith(b"\n"):
                    os.truncate(self._path, content.rfind(b"\n") + 1)


class LineFile:
    """A file of JSON, one object a line, which a resumed run goes on with."""

    def __init__(self, path: Path, say: Callable[[str], None]) -> None:
        self._file = AppendedFile(path, say)
        self._file.cut_half_a_line()

    def add(self, line: dict[str, Any]) -> None:
        """Adds one line."""
        self._file.add((json.dumps(line, allow_nan=False) + "\n").encode())


def _append(path: Path, piece: bytes) -> None:
    handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    try:
        size = os.fstat(handle).st_size
        try:
            rest = memoryview(piece)
            while rest:
                rest = rest[os.write(handle, rest) :]
        except OSError:
            with suppress(OSError):  # a device has no length
                os.ftruncate(handle, size)
            raise
    finally:
        os.close(handle)
