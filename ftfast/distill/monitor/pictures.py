"""Pictures as files whose bytes depend on nothing but what they show."""

import io
import os
from contextlib import suppress
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_METADATA = {"png": {"Software": None}, "svg": {"Date": None}}


def import_matplotlib() -> ModuleType:
    """matplotlib, also where MPLBACKEND names a backend that is not installed; one that there is stays chosen.

    A notebook's kernel hands its own to what it starts. Pictures in files need none.
    """
    chosen = os.environ.pop("MPLBACKEND", None)
    try:
        import matplotlib.figure
    finally:
        if chosen is not None:
            os.environ["MPLBACKEND"] = chosen
    if chosen:
        with suppress(ValueError):
            matplotlib.rcParams["backend"] = chosen
    return matplotlib


def new_figure(width: float, height: float) -> "Figure":
    """An empty figure of so many inches."""
    return import_matplotlib().figure.Figure(figsize=(width, height), layout="constrained")


def drawn(figure: "Figure", kind: str) -> bytes:
    """The figure as a file of the kind ``"png"`` or ``"svg"``."""
    buffer = io.BytesIO()
    with import_matplotlib().rc_context({"svg.hashsalt": "ftfast"}):
        figure.savefig(buffer, format=kind, dpi=150, metadata=_METADATA[kind])
    return buffer.getvalue()
