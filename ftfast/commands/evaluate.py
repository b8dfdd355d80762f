"""``ftfast evaluate``: the test accuracy of a teacher's or student's checkpoint folder."""

import argparse
import json
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ftfast.commands.trained import describe_trained, read_trained
from ftfast.distillation.data import class_names
from ftfast.distillation.data.datasets import DATASETS
from ftfast.distillation.data.photographs import listing
from ftfast.distillation.data.photographs.decoding import of_photographs
from ftfast.distillation.monitor.plots import confusion_counts, draw_confusion
from ftfast.distillation.runtime import files
from ftfast.distillation.settings.presets import settings_of
from ftfast.distillation.settings.run_settings import DTYPES
from ftfast.errors import SettingsError, shown

if TYPE_CHECKING:
    from ftfast.distillation.data.source import Source

MOST_GUESSES = 5
PICTURES = {".png": "png", ".svg": "svg"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("checkpoint", metavar="CHECKPOINT_FOLDER", help="a folder with model.safetensors")
    parser.add_argument("--data", metavar="NAME", help="data set [the checkpoint's]")
    parser.add_argument("--data-dir", metavar="FOLDER", help="where its files are [$FTFAST_DATA or ~/.cache/ftfast]")
    parser.add_argument("--loader", metavar="NAME", help="of photographs: folder, gpu or webdataset [folder]")
    parser.add_argument("--device", metavar="NAME", help="auto, cpu or cuda [auto]")
    parser.add_argument("--dtype", metavar="NAME", help=f"{' or '.join(DTYPES)} [the checkpoint's]")
    parser.add_argument("--confusion", metavar="FILE", help="draw which class is taken for which, .png or .svg")
    parser.add_argument("--json", action="store_true", help="print JSON, the confusion's counts in it")


def run(args: argparse.Namespace) -> int:
    """Prints the accuracy on the test images."""
    from ftfast.distillation.data.source import Source

    picture = None if args.confusion is None else Path(args.confusion)
    if picture is not None and picture.suffix not in PICTURES:
        raise SettingsError(f"confusion is {picture}; it takes a name that ends in {' or '.join(PICTURES)}.")
    source = Source(None if args.data_dir is None else Path(args.data_dir))
    found = evaluate_checkpoint(
        Path(args.checkpoint),
        data=args.data,
        device=args.device,
        dtype=args.dtype,
        source=source,
        loader=args.loader or "folder",
    )
    top5 = "" if found["top5_accuracy"] is None else f" (top 5: {found['top5_accuracy']:.2f} %)"
    line = (
        f"{found['kind']} {shown(found['model']['name'])} with {found['model']['channels']} channels: "
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
    loader: str = "folder",
) -> dict[str, Any]:
    """Test accuracy (top 1 and, of more than five classes, top 5) in percent, cross-entropy, and confusion counts.

    Args:
        data, dtype: default to what the checkpoint was trained on and with.
        device: ``"auto"``, ``"cpu"`` or ``"cuda"``.
        source: where the data set's files are.
        loader: of photographs.

    Raises:
        CheckpointError: not a whole checkpoint of a teacher or student, or trained on other classes.
        SettingsError: an unknown data set, device or dtype.
        DataError: the data set's files are not there or damaged.
    """
    described = describe_trained(folder)
    chosen = {"data": data or described["data"], "device": device or "auto", "dtype": dtype or described["dtype"]}
    if chosen["data"] in DATASETS and chosen["data"] != described["data"]:
        trained_on = shown(repr(described["data"]))
        raise SettingsError(f"data is {chosen['data']!r}, and the checkpoint was trained on {trained_on}.")
    if DATASETS[described["data"]].is_streamed:
        class_names.check_same(folder, described, listing.named(source.folder if source else None, loader))
    settings = settings_of(**chosen, **_of_photographs(described, loader, source)).resolved()

    from ftfast.distillation.phases.setup import load_images, precision_of
    from ftfast.distillation.training.evaluate import logits_of

    precision = precision_of(settings)
    trained = read_trained(folder, precision.device)
    _, test = load_images(settings, source, report=partial(print, file=sys.stderr))
    logits, labels = logits_of(trained.model, test, precision)
    classes = logits.shape[1]
    top = logits.topk(min(MOST_GUESSES, classes), dim=1).indices == labels[:, None]
    return {
        "checkpoint": str(folder),
        "kind": described["kind"],
        "model": described["model"],
        "data": settings.data,
        "dtype": settings.dtype,
        "test_images": len(labels),
        "damaged_images": test.damaged(),
        "accuracy": 100 * int(top[:, 0].sum()) / len(labels),
        "top5_accuracy": 100 * int(top.any(1).sum()) / len(labels) if classes > MOST_GUESSES else None,
        "cross_entropy": float(torch.nn.functional.cross_entropy(logits, labels)),
        "confusion": confusion_counts(logits.argmax(1), labels, classes),
    }


def _of_photographs(described: dict[str, Any], loader: str, source: "Source | None") -> dict[str, Any]:
    """The settings that the images of a checkpoint of photographs have to be read with."""
    if "photographs" not in described:
        return {}
    folder = source.folder if source is not None else None
    return {
        "methods": ("none",),
        "paraphraser_held_out": max(2, described["photographs"]["classes"]),
        "batch_size": 1,
        "loader": loader,
        "image_size": described["photographs"]["size"],
        "classes": described["photographs"]["classes"],
        **of_photographs(described["photographs"])._asdict(),
        "data_dir": None if folder is None else str(folder),
    }
