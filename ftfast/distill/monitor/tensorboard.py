"""TensorBoard logs, written while a training runs: its epochs in one folder, its steps in another below that.

Two folders, since a log that goes on after a restart takes back all that its folder has of later steps, and an epoch's
number is no step's. Events are written as they come, without the thread of torch's SummaryWriter, whose errors reach
the training late or as a traceback.
"""

import os
import socket
import time
from collections.abc import Callable, Mapping
from io import BytesIO
from itertools import count
from pathlib import Path
from typing import Any

from ftfast.distill.monitor.appended import AppendedFile
from ftfast.distill.monitor.epochs import Epoch

STEPS = "steps"  # the folder of a training's steps, below that of its epochs
_files = count()


class Scalars:
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
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary

        now, events = time.time(), []
        if not self._has_begun:
            start = step if first_step is None else first_step
            events.append(Event(wall_time=now, file_version="brain.Event:2"))
            events.append(Event(wall_time=now, step=start, session_log=SessionLog(status=SessionLog.START)))
        scalars = [Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        events.append(Event(wall_time=now, step=step, summary=Summary(value=scalars)))
        self._has_begun = self._file.add(_records(events)) or self._has_begun


class EpochLog:
    """The epochs of one training; one that goes on from a checkpoint replaces what came after it."""

    def __init__(self, root: Path, title: str, say: Callable[[str], None]) -> None:
        self._scalars = Scalars(root, title, say)

    def add(self, record: Epoch) -> None:
        """Adds one epoch: its losses, accuracies in percent and images a second."""
        values = {f"loss/{name}": value for name, value in record.losses.items()}
        accuracies = {"accuracy/test": record.accuracy, "accuracy/test top 5": record.top5_accuracy}
        values |= {name: value for name, value in accuracies.items() if value is not None}
        self._scalars.add({**values, "images per second": record.images / record.seconds}, record.epoch)


def _records(events: list[Any]) -> bytes:
    from tensorboard.summary.writer.record_writer import RecordWriter

    content = BytesIO()
    writer = RecordWriter(content)
    for event in events:
        writer.write(event.SerializeToString())
    return content.getvalue()
