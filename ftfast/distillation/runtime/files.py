"""Files and folders that are there whole or not at all: written aside, flushed to the disk, renamed."""

import errno
import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

LOCK = ".lock"
_ASIDE = ".partial"
# What file systems raise that have no such call, as some networks' and some of user space have not.
_NOT_OFFERED = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK}

_log = logging.getLogger("ftfast")
_said: set[str] = set()


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yields an empty folder to fill, which becomes ``path`` when the block ends without an error.

    After an error nothing of it is left. A kill leaves at most what :func:`is_left_over` knows.

    Raises:
        FileExistsError: ``path`` is there already; nothing of it is touched.
        OSError: it cannot be written, as on a full disk; its ``filename`` says where.
    """
    if path.exists():
        raise FileExistsError(f"{path} is there already.")
    make_folder(path.parent)
    aside = _aside(path)
    shutil.rmtree(aside, ignore_errors=True)
    with _named(path):
        try:
            aside.mkdir()
            yield aside
            for file in aside.iterdir():
                _flush(file)
            _flush(aside)
            os.rename(aside, path)
        except BaseException:
            shutil.rmtree(aside, ignore_errors=True)
            raise
        _flush(path.parent)


def make_folder(path: Path) -> None:
    """Makes a folder and those above it that are missing, each of them flushed into the one above."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in reversed(missing):
        _flush(folder.parent)


def remove_folder(path: Path) -> None:
    """Removes a folder that :func:`new_folder` made; a kill on the way leaves no half of it under its name."""
    aside = _aside(path)
    shutil.rmtree(aside, ignore_errors=True)
    os.rename(path, aside)
    shutil.rmtree(aside)


def write_text(path: Path, text: str) -> None:
    """Replaces a file by ``text``; a kill on the way leaves the file as it was."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Replaces a file by ``content``; a kill on the way leaves the file as it was."""
    make_folder(path.parent)
    aside = _aside(path)
    with _named(path):
        try:
            aside.write_bytes(content)
            _flush(aside)
            os.replace(aside, path)
        except BaseException:
            aside.unlink(missing_ok=True)
            raise
        _flush(path.parent)


def write_json(path: Path, content: Any) -> None:
    """As :func:`write_text`; refuses NaN and infinities, which JSON does not have."""
    write_text(path, json.dumps(content, indent=2, allow_nan=False) + "\n")


_held: set[int] = set()


def _give_up_locks() -> None:
    """In a process that was forked off, as those that read images are: a lock lasts as long as any copy of it."""
    for lock in _held:
        with suppress(OSError):
            os.close(lock)
    _held.clear()


if hasattr(os, "register_at_fork"):  # Windows forks nothing
    os.register_at_fork(after_in_child=_give_up_locks)


@contextmanager
def locked(path: Path, seconds: float = 0.0) -> Iterator[None]:
    """Inside, a folder is this process's alone, by its ``.lock``; it is made where it is missing.

    A file system without locks gives none: that is said once, and the caller goes on.

    Args:
        seconds: how long to wait for another process that holds it.

    Raises:
        BlockingIOError: another process still holds it.
    """
    import fcntl  # here, since Windows has none, and writing needs none

    make_folder(path)
    handle = os.open(path / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    _held.add(handle)
    try:
        deadline = time.monotonic() + seconds
        while True:
            try:
                with _offered(path, "locks no files, so nothing keeps a second process from writing there"):
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    raise
            time.sleep(0.1)
        yield
    finally:
        _held.discard(handle)
        os.close(handle)  # which gives the lock back, as a kill does


def contents(folder: Path, *but: str) -> list[Path]:
    """What a folder holds beside its lock, what a kill left and ``but``; nothing where it is not there."""
    entries = folder.iterdir() if folder.exists() else ()
    return [entry for entry in entries if entry.name not in (LOCK, *but) and not is_left_over(entry)]


def is_left_over(path: Path) -> bool:
    """Whether this is what a kill left of a file or folder that was being written."""
    return path.name.startswith(".") and path.name.endswith(_ASIDE)


def _aside(path: Path) -> Path:
    return path.with_name(f".{path.name}{_ASIDE}")


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Errors name ``path``: what a full disk raises names no file, and the one aside is no longer there."""
    try:
        yield
    except OSError as error:
        if error.filename is None or _aside(path).name in Path(str(error.filename)).parts:
            error.filename, error.filename2 = str(path), None
        raise


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        with _offered(path, "cannot be flushed, so a power failure may lose what was written last"):
            os.fsync(handle)
    finally:
        os.close(handle)


def hash_tensors(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of tensors and their names, whatever file they come from."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def hash_json(content: Any) -> str:
    """SHA-256 of plain values."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


@contextmanager
def _offered(path: Path, consequence: str) -> Iterator[None]:
    """A call that some file systems do not offer: said once in a process, and gone on without."""
    try:
        yield
    except OSError as error:
        if error.errno not in _NOT_OFFERED:
            raise
        if consequence not in _said:
            _said.add(consequence)
            _log.warning(f"warning: the file system of {path} {consequence} ({error.strerror})")
