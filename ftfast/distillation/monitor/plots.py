"""A run in pictures that every colour vision can read: accuracy over epochs, and which class is taken for which.

The bytes of their files depend on nothing but what they show.
"""

import io
import os
from collections.abc import Mapping
from contextlib import suppress
from statistics import fmean, stdev
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

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


def curve_rows(results: dict[str, Any]) -> list[dict[str, Any]]:
    """Test accuracy after each epoch: one row a method and epoch, mean and standard deviation (None for one seed).

    Of many classes that of the likeliest five too.
    """
    rows = []
    histories = [student["history"] for method in results["methods"].values() for student in method["students"]]
    # Those of a run that an older version began have it in later epochs alone.
    has_top5 = all(record.get("top5_accuracy") is not None for history in histories for record in history)
    for name, method in results["methods"].items():
        for records in zip(*(student["history"] for student in method["students"]), strict=True):
            values = [record["accuracy"] for record in records]
            deviation = round(stdev(values), 4) if len(values) > 1 else None
            top5 = (
                {"top5_accuracy_mean": round(fmean(record["top5_accuracy"] for record in records), 4)}
                if has_top5
                else {}
            )
            rows.append(
                {
                    "method": name,
                    "epoch": records[0]["epoch"],
                    "accuracy_mean": round(fmean(values), 4),
                    "accuracy_standard_deviation": deviation,
                    "seeds": len(values),
                    **top5,
                }
            )
    return rows


def draw_curves(
    results: dict[str, Any], rows: list[dict[str, Any]], styles: Mapping[str, tuple[str, Any]]
) -> dict[str, bytes]:
    """The picture's files by format, ``png`` and ``svg``; of each method by its colour and line."""
    figure = new_figure(9, 4)
    from matplotlib.ticker import MaxNLocator

    curves, finals = figure.subplots(1, 2, width_ratios=(3, 2))
    names = list(results["methods"])
    for position, name in enumerate(names):
        colour, line = styles[name]
        own = [row for row in rows if row["method"] == name]
        epochs = [row["epoch"] for row in own]
        low = [row["accuracy_mean"] - (row["accuracy_standard_deviation"] or 0) for row in own]
        high = [row["accuracy_mean"] + (row["accuracy_standard_deviation"] or 0) for row in own]
        curves.plot(epochs, [row["accuracy_mean"] for row in own], linestyle=line, color=colour, label=name, marker=".")
        curves.fill_between(epochs, low, high, color=colour, alpha=0.12, linewidth=0)
        accuracies = [student["accuracy"] for student in results["methods"][name]["students"]]
        finals.plot([position] * len(accuracies), accuracies, "o", color=colour, alpha=0.6)
        finals.plot([position - 0.25, position + 0.25], [fmean(accuracies)] * 2, color=colour, linewidth=2)
    curves.set(xlabel="epoch", ylabel="test accuracy, %", title="mean over seeds, band: standard deviation")
    curves.set_ylim(bottom=_lowest_shown(rows))
    curves.xaxis.set_major_locator(MaxNLocator(integer=True))
    curves.legend(loc="lower right")
    finals.set(title="last epoch, one dot a seed, bar: mean", ylabel="test accuracy, %", xlim=(-0.6, len(names) - 0.4))
    finals.set_xticks(range(len(names)), names)
    for axes in (curves, finals):
        axes.grid(alpha=0.3)
    return {kind: drawn(figure, kind) for kind in ("png", "svg")}


def _lowest_shown(rows: list[dict[str, Any]]) -> float:
    """The axis starts where the curves have left their first steep rise, where that shows more of them."""
    late = [row["accuracy_mean"] for row in rows if row["epoch"] * 3 >= rows[-1]["epoch"]]
    return max(0.0, min(late) - 2)


_NUMBERED_CLASSES = 20  # more do not fit into their cells


def confusion_counts(predicted: Tensor, labels: Tensor, classes: int) -> list[list[int]]:
    """``[true class][predicted class]``: how many images; both arguments are ``[N]`` int64."""
    cells = torch.bincount(labels * classes + predicted, minlength=classes**2)
    return cells.reshape(classes, classes).tolist()


def draw_confusion(counts: list[list[int]], title: str, kind: str) -> bytes:
    """The picture's file, ``kind`` being ``"png"`` or ``"svg"``: each row in percent of the images of its class."""
    cells = torch.tensor(counts, dtype=torch.float64)
    shares = 100 * cells / cells.sum(1, keepdim=True).clamp(min=1)
    side = min(12.0, 4 + 0.3 * len(counts))
    figure = new_figure(side + 1, side)
    axes = figure.subplots()
    picture = axes.imshow(shares.numpy(), cmap="cividis", vmin=0, vmax=100)
    axes.set(title=title, xlabel="predicted class", ylabel="true class")
    figure.colorbar(picture, label="% of the true class", shrink=0.8)
    if len(counts) <= _NUMBERED_CLASSES:
        axes.set_xticks(range(len(counts)))
        axes.set_yticks(range(len(counts)))
        for row, line in enumerate(shares.tolist()):
            for column, share in enumerate(line):
                if counts[row][column]:
                    colour = "black" if share > 50 else "white"
                    axes.text(column, row, f"{share:.0f}", ha="center", va="center", color=colour, fontsize=7)
    return drawn(figure, kind)
