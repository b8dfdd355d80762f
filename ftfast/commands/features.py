"""``ftfast features``: a model's layers with the shapes of what they give, to choose a tap from."""

import argparse
import difflib
import fnmatch
import json
import re
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ftfast.distillation.models import libraries
from ftfast.distillation.models.registry import build_model, check_name
from ftfast.errors import SettingsError

DEFAULT_DEPTH = 2
# What the families for small images are built for; libraries' models take the size of their weights, else 224.
SMALL, LARGE = 32, 224
CLASSES = 10


class Layer(NamedTuple):
    """A layer that ran: its name, its class, the shape of its last output for one image, and how often it ran."""

    name: str
    kind: str
    shape: tuple[int, ...]
    runs: int


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("model", metavar="MODEL", help="torchvision/NAME, timm/NAME, resnet20, wrn-16-2, vgg13, ...")
    parser.add_argument("--image-size", metavar="SIZE", help="224 or 224x160 (height x width) [the model's own]")
    parser.add_argument("--in-channels", metavar="COUNT", type=int, default=3, help="colours of the images [3]")
    parser.add_argument(
        "--depth", metavar="LEVELS", type=int, help=f"dots in a name plus one, 0 for all [{DEFAULT_DEPTH}]"
    )
    parser.add_argument(
        "--filter", metavar="TEXT", help="only names with TEXT in them, or that match a pattern such as 'layer*.conv1'"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Prints the layers in the order in which the model has them."""
    size = None if args.image_size is None else parse_size(args.image_size)
    if args.in_channels < 1:
        raise SettingsError(f"in-channels is {args.in_channels}; it takes a positive number.")
    if args.depth is not None and args.depth < 0:
        raise SettingsError(f"depth is {args.depth}; it takes a number of levels, or 0 for all.")
    layers, size = list_layers(args.model, size, in_channels=args.in_channels)
    depth = args.depth if args.depth is not None else (0 if args.filter else DEFAULT_DEPTH)
    chosen = [layer for layer in layers if not depth or layer.name.count(".") < depth]
    if args.filter is not None:
        pattern = args.filter if any(sign in args.filter for sign in "*?[") else f"*{args.filter}*"
        chosen = [layer for layer in chosen if fnmatch.fnmatchcase(layer.name, pattern)]
        if not chosen:
            near = difflib.get_close_matches(args.filter, [layer.name for layer in layers], n=4, cutoff=0.3)
            advice = f"near to it are {', '.join(near)}" if near else "leave it out to see them all"
            raise SettingsError(f"filter is {args.filter!r}, which no layer of {args.model} matches; {advice}.")
    image = [args.in_channels, *size]
    if args.json:
        print(json.dumps({"model": args.model, "image": image, "layers": [_as_json(it) for it in chosen]}, indent=2))
    else:
        print(_as_text(args.model, image, chosen, len(layers)))
    return 0


def parse_size(text: str) -> tuple[int, int]:
    """``"224"`` or ``"224x160"`` to height and width; SettingsError on anything else."""
    match = re.fullmatch(r"(\d{1,5})(?:x(\d{1,5}))?", text)
    height = int(match[1]) if match else 0
    width = int(match[2] or match[1]) if match else 0
    if height < 1 or width < 1:
        raise SettingsError(f"image-size is {text!r}; it takes pixels such as 224, or height x width such as 224x160.")
    return height, width


def list_layers(
    name: str, size: tuple[int, int] | None = None, *, in_channels: int = 3
) -> tuple[list[Layer], tuple[int, int]]:
    """Every layer that gives a tensor, with its shape for one image, and the image's height and width.

    Args:
        name: as ``ftfast distill`` takes models.
        size: height and width; None for the model's own.

    Raises:
        SettingsError: an unknown model, or images that it cannot take.
    """
    check_name(name)
    model = _without_memory(name, in_channels).eval()
    height, width = size or _own_size(name, model)
    found: dict[str, Layer] = {}

    def note(layer: str, module: nn.Module, _inputs: Any, output: Any) -> None:
        if isinstance(output, Tensor) and output.dim() > 1:
            runs = found[layer].runs + 1 if layer in found else 1
            found[layer] = Layer(layer, type(module).__name__, tuple(output.shape[1:]), runs)

    names = [layer for layer, _ in model.named_modules() if layer]
    for layer in names:
        model.get_submodule(layer).register_forward_hook(partial(note, layer))
    device = next(model.parameters()).device
    try:
        with torch.no_grad():
            model(torch.zeros(1, in_channels, height, width, device=device))
    except (RuntimeError, ValueError, TypeError, AssertionError) as error:
        reason = str(error).strip().partition("\n")[0].rstrip(".")
        raise SettingsError(f"{name} cannot take images of {in_channels}x{height}x{width} ({reason}).") from None
    return [found[layer] for layer in names if layer in found], (height, width)


def _without_memory(name: str, in_channels: int) -> nn.Module:
    build = partial(build_model, name, 0, in_channels=in_channels, classes=CLASSES, seed=0)
    try:
        with torch.device("meta"):
            return build()
    except (NotImplementedError, RuntimeError):  # a library's initialisation may look at the weights
        return build()


def _own_size(name: str, model: nn.Module) -> tuple[int, int]:
    if not libraries.is_library_model(name):
        return SMALL, SMALL
    described = getattr(model, "pretrained_cfg", None) or {}
    height, width = (described.get("input_size") or (3, LARGE, LARGE))[1:]
    return int(height), int(width)


def _as_text(model: str, image: list[int], layers: list[Layer], count: int) -> str:
    rows = [
        (it.name, "x".join(map(str, it.shape)), it.kind + (f", runs {it.runs} times" if it.runs > 1 else ""))
        for it in layers
    ]
    rows.insert(0, ("layer", "shape", "class"))
    widths = [max(len(row[column]) for row in rows) for column in range(2)]
    table = [f"{name:{widths[0]}}  {shape:{widths[1]}}  {kind}" for name, shape, kind in rows]
    hidden = count - len(layers)
    more = f"; {hidden} more with --depth 0" if hidden else ""
    return "\n".join([*table, f"{model}, images of {'x'.join(map(str, image))}: {len(layers)} layers{more}"])


def _as_json(layer: Layer) -> dict[str, Any]:
    return {"name": layer.name, "class": layer.kind, "shape": list(layer.shape), "runs": layer.runs}
