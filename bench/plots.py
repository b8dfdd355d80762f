"""Pictures of a record: time against the yardstick, and speed-ups. Made from the record alone."""

from pathlib import Path
from typing import TYPE_CHECKING

from bench.candidates import FORWARD_BACKWARD
from bench.figures import Figures, groups
from bench.peers import COMPILED, EAGER, YARDSTICK
from bench.records import Record
from bench.tables import provenance

if TYPE_CHECKING:
    from matplotlib.axes import Axes

OURS = "ftfast"
# Okabe and Ito's palette, which the colour-blind can tell apart.
COLOURS = {EAGER: "#E69F00", COMPILED: "#56B4E9", OURS: "#009E73"}
DIGEST_LABEL = "ftfast bench record"


def picture_paths(record_path: Path, bench: str) -> tuple[Path, Path]:
    """Where the SVG and the PNG of a record go: beside it."""
    return record_path.with_suffix(f".{bench}.svg"), record_path.with_suffix(f".{bench}.png")


def digest_in(svg: Path) -> str:
    """The digest of the record that a picture was made from, or nothing."""
    _, found, rest = svg.read_text().partition(f"{DIGEST_LABEL} ")
    return rest[:16] if found else ""


def plot(record: Record, bench: str, record_path: Path) -> list[Path]:
    """Draw a bench of a record as SVG and PNG beside the record.

    Groups without a timed yardstick are left out.

    Returns:
        The files written; none where the record has nothing to draw.
    """
    drawn = {
        name: bars
        for name, members in groups(record.of(bench)).items()
        if (bars := {f.row.candidate: f for f in members if _is_drawn(f)})
    }
    if not drawn:
        return []
    import matplotlib  # Here, since only pictures need it.
    from matplotlib.figure import Figure

    # A fixed salt makes the SVG's identifiers, and so the file, the same each time.
    with matplotlib.rc_context({"svg.hashsalt": "ftfast", "font.size": 9, "svg.fonttype": "path"}):
        # An opaque background, so that the text reads in a dark page too.
        figure = Figure(figsize=(11, 1.6 + 0.75 * len(drawn)), facecolor="white", layout="constrained")
        times, speedups = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
        _bars(times, drawn, dict.fromkeys((EAGER, COMPILED, OURS), "over_yardstick"))
        times.set_xlabel(f"time / time of {YARDSTICK}, log scale: shorter is faster")
        ours = {EAGER: "speedup_over_eager", COMPILED: "speedup_over_compile"}
        _bars(speedups, {name: _speedups(bars) for name, bars in drawn.items()}, ours)
        speedups.set_xlabel(f"speed-up of {OURS}, log scale: longer is faster")
        times.set_yticks(range(len(drawn)), list(drawn))
        times.invert_yaxis()
        handles, labels = times.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper right", ncols=3, frameon=False)
        title = f"{bench}, forward and backward, medians\n{provenance(record)}"
        figure.suptitle(title, x=0.01, ha="left", fontsize=9)
        paths = picture_paths(record_path, bench)
        for path in paths:
            metadata: dict[str, str | None] = {"Description": f"{DIGEST_LABEL} {record.digest}"}
            if path.suffix == ".svg":
                metadata["Date"] = None
            figure.savefig(path, dpi=150, metadata=metadata)
    return list(paths)


def _is_drawn(figures: Figures) -> bool:
    return figures.row.work == FORWARD_BACKWARD and figures.row.candidate in COLOURS and bool(figures.over_yardstick)


def _speedups(bars: dict[str, Figures]) -> dict[str, Figures]:
    """Ours under the name of each peer, which is what its bar is coloured by."""
    return {name: bars[OURS] for name in bars if name != OURS} if OURS in bars else {}


def _bars(axes: "Axes", drawn: dict[str, dict[str, Figures]], fields: dict[str, str]) -> None:
    """A bar for each group and candidate, from 1 (as fast) to the ratio that ``fields`` names."""
    height = 0.8 / len(fields)
    ratios = [1.0]
    for place, (candidate, field) in enumerate(fields.items()):
        bars = [(at, getattr(bars[candidate], field)) for at, bars in enumerate(drawn.values()) if candidate in bars]
        for at, ratio in bars:
            ratios.append(ratio)
            container = axes.barh(
                at + (place - (len(fields) - 1) / 2) * height,
                ratio - 1,
                height * 0.9,
                left=1,
                color=COLOURS[candidate],
                label=candidate if at == bars[0][0] else None,
            )
            axes.bar_label(container, [f"{ratio:.3g}"], padding=3, fontsize=8)
    axes.axvline(1, color="black", linewidth=1)
    axes.set_xscale("log")
    # Room for the labels beyond the bars' ends.
    axes.set_xlim(0.7 * min(ratios), 1.5 * max(ratios))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
