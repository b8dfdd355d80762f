"""The user's folder for what can be made again: tables of measurements, downloaded data, indices of shards."""

import os
from pathlib import Path


def user_folder() -> Path | None:
    """``ftfast`` in ``$XDG_CACHE_HOME``, else in ``~/.cache``; None where the user has no home folder.

    That is so in a container whose user id stands in no list of users.
    """
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ftfast"
    except (RuntimeError, KeyError):
        return None
