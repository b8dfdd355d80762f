"""``ftfast evaluate``: the test accuracy of a teacher's or student's checkpoint folder."""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ftfast.distill import files
from ftfast.distill.confusion import confusion_counts, draw_confusion
from ftfast.distill.errors import SettingsError
from ftfast.distill.presets import settings_of
from ftfast.distill.settings import DTYPES
from ftfast.distill.trained import describe_trained, read_trained

if TYPE_CHECKING:
    from ftfast.distill.data import Source

MOST_GUESSES = 5
PICTURES = {".png": "png", ".svg": "svg"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("checkpoint", metavar="CHECKPOINT_FOLDER", help="a folder with model.safetensors")
    parser.add_argument("--data", metavar="NAME", help="data set [the checkpoint's]")
    parser.add_argument("--data-dir", metavar="FOLDER", help="where its files are [$FTFAST_DATA or ~/.cache/ftfast]")
    parser.add_argument("--device", metavar="NAME", help="auto, cpu or cuda [auto]")
    parser.add_argument("--dtype", metavar="NAME", help=f"{' or '.join(DTYPES)} [the checkpoint's]")
    parser.add_argument("--confusion", metavar="FILE", help="draw which class is taken for which, .png or .svg")
    parser.add_argument("--json", action="store_true", help="print JSON, the confusion's counts in it")


def run(args: argparse.Namespace) -> int:
    """Prints the accuracy on the test images."""
    from ftfast.distill.data import Source

    picture = None if args.confusion is None else Path(args.confusion)
    if picture is not None and picture.suffix not in PICTURES:
        raise SettingsError(f"confusion is {picture}; it takes a name that ends in {' or '.join(PICTURES)}.")
    source = Source(None if args.data_dir is None else Path(args.data_dir))
    found = evaluate_checkpoint(
        Path(args.checkpoint), data=args.data, device=args.device, dtype=args.dtype, source=source
    )
    top5 = "" if found["top5_accuracy"] is None else f" (top 5: {found['top5_accuracy']:.2f} %)"
    line = (
        f"{found['kind']} {found['model']['name']} with {found['model']['channels']} channels: "
        f"{found['accuracy']:.2f} %{top5} of {found['test_images']} test images of {found['data']} ({found['dtype']})"
    )
    if picture is not None:
        files.write_bytes(picture, draw_confusion(found["confusion"], line, PICTURES[picture.suffix]))
    print(json.dumps(found, indent=2) if args.json else line)
    return 0


def evaluate_checkpoint(
    folder: Path,
    *,
    data: str | None = None,
    device: str | None = None,
    dtype: str | None = None,
    source: "Source | None" = None,
) -> dict[str, Any]:
    """Test accuracy (top 1 and, of more than five classes, top 5) in percent, cross-entropy, and confusion counts.

    Args:
        data, dtype: default to what the checkpoint was trained on and with.
        device: ``"auto"``, ``"cpu"`` or ``"cuda"``.
        source: where the data set's files are.

    Raises:
        CheckpointError: not a whole checkpoint of a teacher or student.
        SettingsError: an unknown data set, device or dtype.
        DataError: the data set's files are not there or damaged.
    """
    described = describe_trained(folder)
    settings = settings_of(
        data=data or described["data"], device=device or "auto", dtype=dtype or described["dtype"]
    ).resolved()
    if settings.data != described["data"]:
        raise SettingsError(f"data is {settings.data!r}, and the checkpoint was trained on {described['data']!r}.")

    from ftfast.distill.data import load as load_data
    from ftfast.distill.engine import logits_of
    from ftfast.distill.setup import precision_of

    precision = precision_of(settings)
    trained = read_trained(folder, precision.device)
    _, test = load_data(settings.data, precision.device, source)
    logits = logits_of(trained.model, test, precision)
    classes = logits.shape[1]
    top = logits.topk(min(MOST_GUESSES, classes), dim=1).indices == test.labels[:, None]
    return {
        "checkpoint": str(folder),
        "kind": described["kind"],
        "model": described["model"],
        "data": settings.data,
        "dtype": settings.dtype,
        "test_images": len(test),
        "accuracy": 100 * float(top[:, 0].float().mean()),
        "top5_accuracy": 100 * float(top.any(1).float().mean()) if classes > MOST_GUESSES else None,
        "cross_entropy": float(torch.nn.functional.cross_entropy(logits, test.labels)),
        "confusion": confusion_counts(logits.argmax(1), test.labels, classes),
    }
