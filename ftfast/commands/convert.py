"""``ftfast convert``: a paraphraser's or translator's checkpoint under another project's names."""

import argparse
import io
import json
import pickle
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ftfast.conversion.layouts import LAYOUTS
from ftfast.conversion.stand_ins import load_torch
from ftfast.conversion.state_dicts import Conversion, convert, flat_tensors
from ftfast.distillation.runtime import files
from ftfast.errors import DistillError, shown

SAFETENSORS = ".safetensors"
SUFFIXES = (SAFETENSORS, ".pth", ".pt", ".ckpt", ".bin", ".tar")
NEW = "(zeros)"
# What torch.load says of files that are cut short or of another kind.
_DAMAGES = (RuntimeError, EOFError, OSError, ValueError, KeyError, AttributeError, TypeError, IndexError)


class ConvertError(DistillError):
    """A checkpoint that cannot be read, fits no project or cannot be written."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    projects = ", ".join(LAYOUTS)
    parser.add_argument("input", metavar="IN", help=f"a checkpoint ({SAFETENSORS}, else a file of torch.save)")
    parser.add_argument("output", metavar="OUT", help=f"the state_dict to write ({', '.join(SUFFIXES)})")
    parser.add_argument("--to", metavar="PROJECT", default="ftfast", help=f"{projects} [ftfast]")
    parser.add_argument("--from", metavar="PROJECT", dest="source", help="the same [recognised by the keys]")
    parser.add_argument("--part", metavar="NAME", default="", help="the network in IN, where IN has more than one")
    parser.add_argument("--prefix", metavar="TEXT", default="", help="before every new key, such as module.")
    parser.add_argument(
        "--under", metavar="KEY", default="", help="write {KEY: state_dict}, as some programs expect it"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace OUT where it is there")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Writes the file and prints which key became which."""
    source, output = Path(args.input), Path(args.output)
    for name, project in (("to", args.to), ("from", args.source)):
        if project is not None and project not in LAYOUTS:
            raise ConvertError(f"{name} is {project!r}; it takes {', '.join(LAYOUTS)}.")
    _check_output(output, overwrite=args.overwrite, under=args.under)
    state_dict = read_state_dict(source)
    try:
        found = convert(state_dict, args.to, args.source, args.part, args.prefix)
    except ValueError as error:
        raise ConvertError(f"{source}: {error}") from None
    write_state_dict(output, {entry.new: entry.tensor for entry in found.tensors}, under=args.under)
    print(json.dumps(_as_json(found, args.to, output), indent=2) if args.json else _as_text(found, args.to, output))
    return 0


def read_state_dict(path: Path) -> dict[str, Any]:
    """What is in a file of torch.save or safetensors, on the CPU; nothing in it is run.

    Objects beside the tensors, such as a training script's arguments, are left unread.

    Raises:
        ConvertError: a file that is cut short, of another kind, or without a tensor outside its objects.
    """
    if path.suffix == SAFETENSORS:
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return dict(load_file(path))
        except SafetensorError as error:
            raise ConvertError(f"{path} is not a whole safetensors file ({shown(str(error))}).") from None
    try:
        loaded, names = load_torch(path)
    except pickle.UnpicklingError as error:
        if refused := re.search(r"(?:GLOBAL|class) (\S+)", str(error)):
            raise ConvertError(_objects(path, refused[1])) from None
        raise ConvertError(f"{path} is not a whole file of torch.save.") from None
    except _DAMAGES as error:
        if isinstance(error, torch.OutOfMemoryError) or (isinstance(error, OSError) and error.filename is not None):
            raise
        raise ConvertError(f"{path} is not a whole file of torch.save.") from None
    if names and (not isinstance(loaded, dict) or not any(True for _ in flat_tensors(loaded))):
        raise ConvertError(_objects(path, names[0]))
    if not isinstance(loaded, dict):
        raise ConvertError(f"{path} holds a {type(loaded).__name__}; it takes a state_dict or a dictionary with one.")
    return loaded


def _objects(path: Path, name: str) -> str:
    return (
        f"{path} holds {shown(name)}, and objects are not loaded; save the network's state_dict alone with torch.save."
    )


def write_state_dict(path: Path, tensors: dict[str, Tensor], *, under: str = "") -> None:
    """Replaces a file by the tensors, in safetensors or torch.save's format by its name's ending."""
    if path.suffix == SAFETENSORS:
        from safetensors.torch import save

        # copies: safetensors refuses tensors that share memory
        apart = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
        files.write_bytes(path, save(apart, metadata={"format": "pt"}))
        return
    content = io.BytesIO()
    torch.save({under: tensors} if under else tensors, content)
    files.write_bytes(path, content.getvalue())


def _check_output(path: Path, *, overwrite: bool, under: str) -> None:
    if path.suffix not in SUFFIXES:
        raise ConvertError(f"OUT is {path}; it takes a name that ends in {', '.join(SUFFIXES)}.")
    if under and path.suffix == SAFETENSORS:
        raise ConvertError(f"under is {under!r}, and a {SAFETENSORS} file has no dictionaries in it; name a .pth file.")
    if path.is_dir():
        raise ConvertError(f"OUT is {path}, which is a folder; it takes a file's name.")
    if path.exists() and not overwrite:
        raise ConvertError(f"{path} is there already; give --overwrite or another name.")


def _title(found: Conversion, to: str) -> str:
    norm = "with batch norm" if found.has_norm else "without batch norm"
    return (
        f"{found.network} of {' or '.join(found.sources)} {norm}, {found.in_channels} channels to factors of "
        f"{found.factor_channels}, written as {to}'s"
    )


def _as_text(found: Conversion, to: str, output: Path) -> str:
    rows = [("old key", "new key", "shape")]
    rows += [
        (shown(entry.old) or NEW, shown(entry.new), "x".join(map(str, entry.tensor.shape)) or "-")
        for entry in found.tensors
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(2)]
    table = [f"{old:{widths[0]}}  {new:{widths[1]}}  {shape}" for old, new, shape in rows]
    norm = ', norm="batch"' if found.has_norm else ""
    sizes = f"{found.in_channels}, factor_channels={found.factor_channels}{norm}"
    loads = f"\nit loads into ftfast.{found.network.capitalize()}({sizes})" if to == "ftfast" else ""
    return "\n".join([*table, f"{output}: {_title(found, to)}{loads}"])


def _as_json(found: Conversion, to: str, output: Path) -> dict[str, Any]:
    return {
        "output": str(output),
        "from": list(found.sources),
        "to": to,
        "network": found.network,
        "batch_norm": found.has_norm,
        "in_channels": found.in_channels,
        "factor_channels": found.factor_channels,
        "tensors": [
            {"old": entry.old or None, "new": entry.new, "shape": list(entry.tensor.shape)} for entry in found.tensors
        ],
    }
