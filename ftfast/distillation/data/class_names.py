"""Which class a label means, compared wherever two sides know it: labels that are shifted look like any others."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ftfast.errors import CheckpointError, shown

KEY = "class_names"
"""Of a checkpoint's description: the classes' names by label, where they are known."""

Side = tuple[str, Sequence[str] | None]
"""What one side is called, and its classes' names by label; None where it does not know them."""


def difference(first: Side, second: Side) -> str:
    """Both lists and what is in one of them alone, in words that go on with a sentence; empty where there is none."""
    names = [side[1] for side in (first, second)]
    if names[0] is None or names[1] is None or list(names[0]) == list(names[1]):
        return ""
    lists = " and ".join(f"{name} has {_listed(found or ())}" for name, found in (first, second))
    alone = [
        f"only in {side[0]}: {_listed(sorted(set(own) - set(other)))}"
        for side, own, other in ((first, names[0], names[1]), (second, names[1], names[0]))
        if set(own) - set(other)
    ]
    return f": {lists} ({'; '.join(alone) or 'the same ones in another order'})"


def _listed(names: Sequence[str]) -> str:
    return shown(", ".join(names))


def check_same(path: Path, described: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """Raises CheckpointError where a checkpoint's classes are others than those of the photographs at hand.

    Args:
        described: the checkpoint's description.
        own: what :func:`named` says of the photographs.
    """
    if unlike := difference(("the checkpoint", described.get(KEY)), ("--data-dir", own.get(KEY))):
        raise CheckpointError(
            f"{shown(str(path))} was trained on other classes than --data-dir has{unlike}; give the folder with its "
            "own classes, or another checkpoint."
        )
