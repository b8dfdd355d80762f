"""Accuracy over epochs by method: the numbers, and a picture of them that every common colour vision can read."""

from statistics import fmean, stdev
from typing import Any

from ftfast.distill.monitor.pictures import drawn

# Okabe and Ito's colours, told apart with every common colour vision; line styles tell them apart without colour.
STYLES: dict[str, tuple[str, Any]] = {
    "none": ("#000000", "-"),
    "ft": ("#D55E00", "--"),
    "kd": ("#0072B2", "-."),
    "ft+kd": ("#009E73", ":"),
    "at": ("#E69F00", (0, (5, 1))),
    "fitnet": ("#CC79A7", (0, (3, 1, 1, 1))),
    "at+kd": ("#56B4E9", (0, (1, 2))),
}


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


def draw_curves(results: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, bytes]:
    """The picture's files by format: ``png`` and ``svg``."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(9, 4), layout="constrained")
    curves, finals = figure.subplots(1, 2, width_ratios=(3, 2))
    names = list(results["methods"])
    for position, name in enumerate(names):
        colour, line = STYLES[name]
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
