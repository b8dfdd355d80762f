"""Which classes a model takes for which: counts, and a picture of them."""

import torch
from torch import Tensor

from ftfast.distill.monitor.pictures import drawn

_NUMBERED_CLASSES = 20  # more do not fit into their cells


def confusion_counts(predicted: Tensor, labels: Tensor, classes: int) -> list[list[int]]:
    """``[true class][predicted class]``: how many images; both arguments are ``[N]`` int64."""
    cells = torch.bincount(labels * classes + predicted, minlength=classes**2)
    return cells.reshape(classes, classes).tolist()


def draw_confusion(counts: list[list[int]], title: str, kind: str) -> bytes:
    """The picture's file, ``kind`` being ``"png"`` or ``"svg"``: each row in percent of the images of its class."""
    from matplotlib.figure import Figure

    cells = torch.tensor(counts, dtype=torch.float64)
    shares = 100 * cells / cells.sum(1, keepdim=True).clamp(min=1)
    side = min(12.0, 4 + 0.3 * len(counts))
    figure = Figure(figsize=(side + 1, side), layout="constrained")
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
