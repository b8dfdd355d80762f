"""Files that a run adds to while it goes, and can do without: lines of JSON, and TensorBoard's events.

A full disk is told of and does not end the run. TensorBoard has a training's epochs in one folder and its steps in
another below that, since a log that goes on after a restart takes back all that its folder has of later steps, and an
epoch's number is no step's. Events are written as they come: on a full disk the thread of torch's SummaryWriter ends
with a traceback, and writes nothing any more.
"""

import json
import os
import socket
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from io import BytesIO
from itertools import count
from pathlib import Path
from typing import Any

STEPS = "steps"  # the folder of a training's steps, below that of its epochs
_files = count()


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


def add_line(file: AppendedFile, line: dict[str, Any]) -> None:
    """Adds an object of JSON."""
    file.add((json.dumps(line, allow_nan=False) + "\n").encode())


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


class Events:
    """One event file; what earlier ones in its folder have from its first step on no longer counts.

    Args:
        root: of all logs of the run, named where they cannot be written.
        title: the folder below it.
        say: takes a line where the disk fails.
    """

    def __init__(self, root: Path, title: str, say: Callable[[str], None]) -> None:
        # Named as TensorBoard's own, in whose order files are read.
        name = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}.{next(_files):06d}"
        self._file = AppendedFile(root / title / name, say, named=root)
        self._has_begun = False

    def add(self, values: Mapping[str, float], step: int, first_step: int | None = None) -> None:
        """Adds numbers by name.

        Args:
            first_step: from which on earlier files do not count, the step itself by default; used at the first call.
        """
        from tensorboard.compat.proto.summary_pb2 import Summary

        scalars = [Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self._add(scalars, step, step if first_step is None else first_step)

    def add_text(self, name: str, text: str) -> None:
        """Adds Markdown, in place of what earlier files have."""
        from tensorboard.plugins.text.summary_v2 import text_pb

        self._add(text_pb(name, text).value, 0, 0)

    def _add(self, values: Iterable[Any], step: int, first_step: int) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.record_writer import RecordWriter

        now, events = time.time(), []
        if not self._has_begun:
            events.append(Event(wall_time=now, file_version="brain.Event:2"))
            events.append(Event(wall_time=now, step=first_step, session_log=SessionLog(status=SessionLog.START)))
        events.append(Event(wall_time=now, step=step, summary=Summary(value=values)))
        content = BytesIO()
        writer = RecordWriter(content)
        for event in events:
            writer.write(event.SerializeToString())
        self._has_begun = self._file.add(content.getvalue()) or self._has_begun
