"""Checkpoints on the way to a result: training stands still while they are copied, and a thread writes the copies."""

import errno
import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from ftfast.distillation.runtime import checkpoint, files
from ftfast.distillation.runtime.checkpoint import Checkpoint
from ftfast.errors import CheckpointError

_FULL = (errno.ENOSPC, errno.EDQUOT)


class Snapshots:
    """A folder of the last checkpoints of one training, newer names sorting after older ones.

    It is a context: on leaving, what is being written is waited for.

    Args:
        folder: of the checkpoints' folders; made when the first is written.
        kept: how many stay, at least 1.
        say: takes a line about a checkpoint that is damaged or cannot be written; called in the caller's thread.
    """

    def __init__(self, folder: Path, *, kept: int = 3, say: Callable[[str], None] = lambda _: None) -> None:
        self._folder = folder
        self._kept = kept
        self._say = say
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._writing: Future[None] | None = None
        self._has_warned = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is None:
            self.is_idle(wait=True)
        self._thread.shutdown(wait=True)

    def newest(self) -> tuple[Path, Checkpoint] | None:
        """The newest whole checkpoint, or None where there is none; newer ones that are damaged are removed.

        Raises:
            CheckpointError: all are damaged; nothing is removed then.
        """
        for left in self._folder.glob(".*") if self._folder.is_dir() else ():
            if files.is_left_over(left):
                shutil.rmtree(left, ignore_errors=True)
        damaged: list[tuple[Path, CheckpointError]] = []
        for folder in reversed(self._folders()):
            try:
                found = checkpoint.load(folder)
            except CheckpointError as error:
                damaged.append((folder, error))
                continue
            for other, reason in damaged:
                self._say(f"warning: {str(reason).rstrip('.')}; going on from the checkpoint before it, {folder.name}")
                files.remove_folder(other)
            return folder, found
        if damaged:
            raise CheckpointError(
                f"{self._folder} has no checkpoint that is whole ({str(damaged[0][1]).rstrip('.')}); "
                "remove it to train from the beginning."
            )
        return None

    def save(self, name: str, content: Checkpoint, *, is_last: bool = False) -> None:
        """Copies the tensors to the CPU and has them written; they may change once this has returned.

        Where the name is there already, or a number is not finite, nothing is written. One that is still being
        written is waited for.

        Args:
            is_last: waits until it is written; a disk that fails is told of though it has been before.
        """
        self.is_idle(wait=True)
        self._has_warned = self._has_warned and not is_last
        tensors, state = tree_map_only(Tensor, _copy_begun, (content.tensors, content.state))
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        copy = Checkpoint(tensors, state, content.description)
        self._writing = self._thread.submit(self._write_and_prune, self._folder / name, copy)
        self.is_idle(wait=is_last)

    def is_idle(self, *, wait: bool = False) -> bool:
        """Whether nothing is being written, once waited for with ``wait``; a disk that fails is then told of."""
        if self._writing is None or not (wait or self._writing.done()):
            return self._writing is None
        error = self._writing.exception()
        self._writing = None
        if error is None:
            self._has_warned = False
        elif not isinstance(error, OSError):
            raise error
        elif not self._has_warned:
            self._has_warned = True
            names = [folder.name for folder in self._folders()]
            stands = f"{names[-1]} stands" if names else "there is none yet"
            self._say(f"warning: the checkpoint {error.filename} cannot be written: {error.strerror}; {stands}")
        return True

    def write(self, folder: Path, content: Checkpoint) -> None:
        """Writes a checkpoint; where the disk is full again, without those on the way but the newest."""
        try:
            checkpoint.save(folder, content)
        except OSError as error:
            older = self._folders()[:-1]
            if error.errno not in _FULL or not older:
                raise
            self._remove(older)  # the newest one stays until there is a newer
            checkpoint.save(folder, content)

    def remove(self) -> None:
        """Removes the folder, once nothing is being written."""
        self.is_idle(wait=True)
        if self._folder.is_dir():
            files.remove_folder(self._folder)

    def _folders(self) -> list[Path]:
        return sorted(self._folder.glob("[!.]*"))

    def _write_and_prune(self, folder: Path, content: Checkpoint) -> None:
        if not folder.exists() and is_finite(content):
            self.write(folder, content)
            self._remove(self._folders()[: -self._kept])

    def _remove(self, folders: list[Path]) -> None:
        for folder in folders:
            files.remove_folder(folder)


def is_finite(content: Checkpoint) -> bool:
    """Whether every number of a checkpoint's tensors is."""
    tensors = (leaf for leaf in tree_leaves((content.tensors, content.state)) if isinstance(leaf, Tensor))
    return all(bool(torch.isfinite(tensor).all()) for tensor in tensors if tensor.is_floating_point())


def _copy_begun(tensor: Tensor) -> Tensor:
    """On the CPU; a GPU copies into pinned memory, which torch keeps for the next time, while Python goes on."""
    if not tensor.is_cuda:
        return tensor.detach().to("cpu", copy=True)
    return torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor.detach(), non_blocking=True)
