"""The folder that a run or a training writes to: whether it can be had, and that nobody else writes there."""

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from os import PathLike, fspath
from pathlib import Path

from ftfast.distillation.runtime import files
from ftfast.errors import RunFolderError

# A process that was killed may take moments to go, and one that was told to stop saves first.
LOCK_SECONDS = 10.0


def folder_at(output: str | PathLike[str]) -> Path:
    """The folder's path; raises RunFolderError where no folder can have it."""
    path = fspath(output)
    if not path or "\0" in path:
        raise RunFolderError(f"output is {path!r}; it takes a folder's path, which is not empty and has no NUL in it.")
    return Path(path)


def check_can_be_written(path: Path, advice: str) -> None:
    """Raises RunFolderError, with the advice, where no folder can be had at ``path``; writes nothing."""
    nearest = next((parent for parent in (path, *path.absolute().parents) if parent.exists()), Path("/"))
    if not nearest.is_dir():
        raise RunFolderError(f"output {path} cannot be a folder: {nearest} is a file; {advice}.")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise RunFolderError(f"output {path} cannot be written: no permission for {nearest}; {advice}.")


@contextmanager
def own_folder(
    path: Path, check: Callable[[], None], begin: Callable[[], None], *, resume: bool, advice: str
) -> Iterator[None]:
    """Inside, the folder is this process's alone.

    Args:
        check: raises where it holds something else; called before anything is written, and again inside, since another
            process may have filled it meanwhile.
        begin: writes what the folder begins with.
        resume: wait for a process that may be about to go.
        advice: what to do where it cannot be had.

    Raises:
        RunFolderError: it cannot be written, or another process writes to it.
    """
    check()
    with ExitStack() as stack:
        try:
            stack.enter_context(files.locked(path, LOCK_SECONDS if resume else 0.0))
            check()
            begin()
        except BlockingIOError:
            raise RunFolderError(
                f"output {path} cannot be used: another process is writing to it; wait for it or {advice}."
            ) from None
        except OSError as error:
            raise RunFolderError(f"output {path} cannot be written ({error.strerror}); {advice}.") from None
        yield
