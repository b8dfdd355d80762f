"""What outlives the processes that torchrun starts, and starts again after a failure: torchrun itself, and its store.

Without torchrun, or where its store cannot be reached, nothing is known and nothing is kept.
"""

import hashlib
import json
import os
import signal
from contextlib import suppress
from datetime import timedelta
from functools import lru_cache
from pathlib import Path

import torch.distributed as dist

from ftfast.distillation.runtime.signals import Interrupted
from ftfast.errors import DistillError

_PATIENCE = timedelta(seconds=5)
_ENDED = "ended"
_LAUNCHER = os.getppid()


def agent() -> bytes | None:
    """Twenty bytes that stand for the torchrun that started this process; None where none did, or it is unknown."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return None
    try:
        machine = Path("/proc/sys/kernel/random/boot_id").read_text()
        began = Path(f"/proc/{os.getppid()}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return None
    # A number of a process comes again, and with the moment of its start it does not.
    return hashlib.sha1(f"{machine} {os.getppid()} {began}".encode(), usedforsecurity=False).digest()


def restarts() -> int:
    """How often torchrun has started the processes anew after a failure."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def end_again() -> None:
    """In a process that torchrun started once more: raises what had ended the run for good.

    Raises:
        DistillError, Interrupted: that, in the same words.
    """
    kept = None
    with suppress(RuntimeError):
        if (store := _reached()) is not None and store.check([_ENDED]):
            kept = store.get(_ENDED)
    if kept is None:
        return
    number, sentence = json.loads(kept)
    raise Interrupted(number, sentence) if number else DistillError(sentence)


def remember(end: DistillError | Interrupted) -> None:
    """Keeps what has ended the run, where starting it again would be wrong or would end in the same way.

    SIGTERM is not kept: torchrun itself sends it to the processes that are left when it is about to start all anew.
    """
    if isinstance(end, Interrupted):
        is_final, number, sentence = end.number != signal.SIGTERM, int(end.number), end.advice
    else:
        is_final, number, sentence = end.is_final, 0, str(end)
    store = _reached()
    if is_final and store is not None:
        with suppress(RuntimeError):  # torchrun has gone, and starts nothing again
            store.compare_set(_ENDED, "", json.dumps([number, sentence]))


def is_first_to_say(sentence: str) -> bool | None:
    """Whether no other process of this start has asked this; None where that cannot be known."""
    store = _reached()
    if store is None:
        return None
    name = hashlib.sha1(sentence.encode(errors="backslashreplace"), usedforsecurity=False).hexdigest()
    with suppress(RuntimeError):
        return store.add(f"said/{restarts()}/{name}", 1) == 1
    return None


def _reached() -> dist.Store | None:
    """The store while torchrun is there; of one that is gone, torch would print a page before it raises."""
    return _store() if os.getppid() == _LAUNCHER else None


@lru_cache
def _store() -> dist.Store | None:
    """Not the one of ``env://``, which has another name after each restart."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    with suppress(RuntimeError):
        store = dist.TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=_PATIENCE)
        return dist.PrefixStore("ftfast", store)
    return None
