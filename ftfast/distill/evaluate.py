"""``ftfast evaluate``: the test accuracy of a teacher's or student's checkpoint folder."""

import argparse
import json
from pathlib import Path
from typing import Any

from ftfast.distill.checkpoint import SETTINGS_FILE, fill, load, read_description
from ftfast.distill.errors import CheckpointError, SettingsError
from ftfast.distill.settings import DTYPES, Settings

KINDS = ("teacher", "student")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("checkpoint", metavar="CHECKPOINT_FOLDER", help="a folder with model.safetensors")
    parser.add_argument("--data", metavar="NAME", help="data set [the checkpoint's]")
    parser.add_argument("--device", metavar="NAME", help="auto, cpu or cuda [auto]")
    parser.add_argument("--dtype", metavar="NAME", help=f"{' or '.join(DTYPES)} [the checkpoint's]")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Prints the accuracy on the test images."""
    found = evaluate_checkpoint(Path(args.checkpoint), data=args.data, device=args.device, dtype=args.dtype)
    if args.json:
        print(json.dumps(found, indent=2))
    else:
        print(
            f"{found['kind']} {found['model']['name']} with {found['model']['channels']} channels: "
            f"{found['accuracy']:.2f} % of {found['test_images']} test images of {found['data']} ({found['dtype']})"
        )
    return 0


def _check_description(description: dict[str, Any], folder: Path) -> None:
    model = description.get("model")
    kinds = {"name": str, "channels": int, "shortcut": str}
    named = {"data", "dtype"} <= description.keys() and isinstance(model, dict) and model.keys() == kinds.keys()
    typed = named and all(isinstance(value, kinds[key]) for key, value in dict(model or {}).items())
    if not typed or description["model"]["channels"] < 1:
        raise CheckpointError(f"{folder} does not say what its model is: its {SETTINGS_FILE} was changed.")


def evaluate_checkpoint(
    folder: Path, *, data: str | None = None, device: str | None = None, dtype: str | None = None
) -> dict[str, Any]:
    """Test accuracy in percent and cross-entropy of a checkpoint folder's model.

    Args:
        data, dtype: default to what the checkpoint was trained on and with.
        device: ``"auto"``, ``"cpu"`` or ``"cuda"``.

    Raises:
        CheckpointError: not a whole checkpoint of a teacher or student.
        SettingsError: an unknown data set, device or dtype.
    """
    description = read_description(folder)
    if description.get("kind") not in KINDS:
        raise CheckpointError(
            f"{folder} is a checkpoint of kind {description.get('kind')!r}; it takes teacher or student."
        )
    _check_description(description, folder)
    settings = Settings(
        data=data or description["data"], device=device or "auto", dtype=dtype or description["dtype"]
    ).resolved()
    if settings.data != description["data"]:
        raise SettingsError(f"data is {settings.data!r}, and the checkpoint was trained on {description['data']!r}.")

    from ftfast.distill.data import load as load_data
    from ftfast.distill.engine import evaluate
    from ftfast.distill.setup import precision_of
    from ftfast.distill.teacher import build

    precision = precision_of(settings)
    checkpoint = load(folder)
    model = build(description["model"], settings.data, seed=0, device=precision.device)
    fill(model, checkpoint.tensors, folder, description["model"]["name"])
    _, test = load_data(settings.data, precision.device)
    accuracy, loss = evaluate(model, test, precision)
    return {
        "checkpoint": str(folder),
        "kind": description["kind"],
        "model": description["model"],
        "data": settings.data,
        "dtype": settings.dtype,
        "test_images": len(test),
        "accuracy": accuracy,
        "cross_entropy": loss,
    }
