"""How pictures of records look, and how they are written: colours, markers and lines; SVG and PNG."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from bench.harness.machine import CHECKOUT
from bench.harness.records import RECORDS, Record
from bench.peers import COMPILED, EAGER, YARDSTICK
from bench.results.tables import provenance
from ftfast.distillation.monitor.plots import import_matplotlib

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

OURS = "ftfast"
LIBRARY = "library"
LIBRARY_HEAD = "library + FTLoss"
DIGEST_LABEL = "ftfast bench record"
PICTURES = CHECKOUT / "docs" / "pictures"


class Style(NamedTuple):
    """Of a candidate: told apart by more than its colour."""

    colour: str
    marker: str
    line: str
    hatch: str


# Okabe and Ito's palette, which the colour-blind can tell apart.
STYLES = {
    EAGER: Style("#E69F00", "s", "--", "//"),
    COMPILED: Style("#56B4E9", "^", "-.", ".."),
    OURS: Style("#009E73", "o", "-", ""),
    YARDSTICK: Style("#666666", "x", ":", "xx"),
    LIBRARY: Style("#CC79A7", "D", (0, (5, 1, 1, 1)), "\\\\"),  # type: ignore[arg-type]
    LIBRARY_HEAD: Style("#D55E00", "v", (0, (3, 1, 1, 1, 1, 1)), "++"),  # type: ignore[arg-type]
}


@contextmanager
def figure(width: float, height: float) -> Iterator["Figure"]:
    """An empty figure, to be filled and saved inside."""
    matplotlib = import_matplotlib()  # Here, since only pictures need it.
    # A fixed salt makes the SVG's identifiers, and so the file, the same each time.
    with matplotlib.rc_context({"svg.hashsalt": "ftfast", "font.size": 9, "svg.fonttype": "path"}):
        # An opaque background, so that the text reads in a dark page too.
        yield matplotlib.figure.Figure(figsize=(width, height), facecolor="white", layout="constrained")


def save(drawn: "Figure", record: Record, title: str, paths: Sequence[Path]) -> list[Path]:
    """Write a figure with its title, where it was measured, and the record's digest."""
    paths[0].parent.mkdir(parents=True, exist_ok=True)
    drawn.suptitle(f"{title}\n{provenance(record)}", x=0.01, ha="left", fontsize=9)
    for path in paths:
        metadata: dict[str, str | None] = {"Description": f"{DIGEST_LABEL} {record.digest}"}
        if path.suffix == ".svg":
            metadata["Date"] = None
        drawn.savefig(path, dpi=150, metadata=metadata)
    return list(paths)


def plain(axes: "Axes") -> None:
    """Axes without a box, with a faint grid and numbers written out."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(visible=True, which="major", color="#DDDDDD", linewidth=0.6)
    axes.set_axisbelow(True)


def picture_paths(record_path: Path, bench: str) -> tuple[Path, Path]:
    """Where the SVG and the PNG of a record go: beside it; those of a committed record to the docs, which show them."""
    folder = PICTURES if record_path.resolve().parent == RECORDS else record_path.parent
    return folder / f"{record_path.stem}.{bench}.svg", folder / f"{record_path.stem}.{bench}.png"


def digest_in(svg: Path) -> str:
    """The digest of the record that a picture was made from, or nothing."""
    _, found, rest = svg.read_text().partition(f"{DIGEST_LABEL} ")
    return rest[:16] if found else ""
