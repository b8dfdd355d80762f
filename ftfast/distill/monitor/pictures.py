"""Pictures as files whose bytes depend on nothing but what they show."""

import io

import matplotlib
from matplotlib.figure import Figure

_METADATA = {"png": {"Software": None}, "svg": {"Date": None}}


def drawn(figure: Figure, kind: str) -> bytes:
    """The figure as a file of the kind ``"png"`` or ``"svg"``."""
    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "ftfast"}):
        figure.savefig(buffer, format=kind, dpi=150, metadata=_METADATA[kind])
    return buffer.getvalue()
