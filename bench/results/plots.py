"""Pictures of a record, made from the record alone: bars here, curves and rooflines in modules of their own."""

from pathlib import Path
from typing import TYPE_CHECKING

from bench.harness.gate import FORWARD_BACKWARD
from bench.harness.records import Record
from bench.peers import COMPILED, EAGER, YARDSTICK
from bench.results import curves, drawing, roofline
from bench.results.drawing import OURS, STYLES, digest_in, picture_paths
from bench.results.tables import Figures, groups

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["digest_in", "picture_names", "picture_paths", "plot"]

BARS = (EAGER, COMPILED, OURS)


def picture_names(bench: str) -> tuple[str, ...]:
    """What :func:`plot` may draw of a bench, as :func:`bench.results.drawing.picture_paths` takes it."""
    return bench, roofline.picture_name(bench)


def plot(record: Record, bench: str, record_path: Path) -> list[Path]:
    """Draw a bench of a record as SVG and PNG beside the record.

    Returns:
        The files written: bars or, of a sweep, curves, and a roofline; each only where the record has its figures.
    """
    draw = curves.plot if curves.sweeps(record.of(bench)) else _plot_bars
    found = draw(record, bench, picture_paths(record_path, bench))
    return found + roofline.plot(record, bench, picture_paths(record_path, roofline.picture_name(bench)))


def _plot_bars(record: Record, bench: str, paths: tuple[Path, Path]) -> list[Path]:
    """Time against the yardstick, and speed-ups; groups without a timed yardstick are left out."""
    drawn = {
        name: bars
        for name, members in groups(record.of(bench)).items()
        if (bars := {f.row.candidate: f for f in members if _is_drawn(f)})
    }
    if not drawn:
        return []
    with drawing.figure(11, 1.6 + 0.75 * len(drawn)) as figure:
        times, speedups = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
        _bars(times, drawn, dict.fromkeys(BARS, "over_yardstick"))
        times.set_xlabel(f"time / time of {YARDSTICK}, log scale: shorter is faster")
        ours = {EAGER: "speedup_over_eager", COMPILED: "speedup_over_compile"}
        _bars(speedups, {name: _speedups(bars) for name, bars in drawn.items()}, ours)
        speedups.set_xlabel(f"speed-up of {OURS}, log scale: longer is faster")
        times.set_yticks(range(len(drawn)), list(drawn))
        times.invert_yaxis()
        handles, labels = times.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper right", ncols=3, frameon=False)
        return drawing.save(figure, record, f"{bench}, forward and backward, medians", paths)


def _is_drawn(figures: Figures) -> bool:
    return figures.row.work == FORWARD_BACKWARD and figures.row.candidate in BARS and bool(figures.over_yardstick)


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
                color=STYLES[candidate].colour,
                hatch=STYLES[candidate].hatch,
                edgecolor="white",
                linewidth=0,
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
