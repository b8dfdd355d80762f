"""Epoch records as TensorBoard logs, written while a training runs."""

from pathlib import Path
from types import TracebackType
from typing import Self

from ftfast.distill.engine import Epoch


class EpochLog:
    """A TensorBoard folder of one training; a training that goes on from a checkpoint replaces what came after it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._writer: object | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._writer is not None:
            self._writer.close()  # type: ignore[attr-defined]

    def add(self, record: Epoch) -> None:
        """Adds one epoch: its losses, accuracy in percent and images a second."""
        from torch.utils.tensorboard import SummaryWriter

        if self._writer is None:
            self._writer = SummaryWriter(str(self._folder), purge_step=record.epoch)
        writer: SummaryWriter = self._writer  # type: ignore[assignment]
        for name, value in record.losses.items():
            writer.add_scalar(f"loss/{name}", value, record.epoch)
        if record.accuracy is not None:
            writer.add_scalar("accuracy/test", record.accuracy, record.epoch)
        writer.add_scalar("images per second", record.images / record.seconds, record.epoch)
