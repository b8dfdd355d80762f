"""The arguments of ``python -m bench``, checked before anything is measured."""

import argparse
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import torch

from bench.harness.measuring import QUICK_PLAN, Plan
from bench.harness.records import RecordError, load
from bench.harness.registry import Bench, Settings
from bench.peers import PEERS
from bench.shapes import DEFAULT_HEADS, DEFAULT_SHAPES, QUICK_HEADS, QUICK_SHAPES, SHAPES, head_on, parse_shape
from ftfast import dispatch
from ftfast.commands.tune.heads import HEADS, parse_head

DTYPES = {
    str(dtype).removeprefix("torch."): dtype for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16)
}
ALL = "all"
LAYOUTS = ("nchw", "channels_last")
PAIRS = ("cifar", "imagenet")
LOADERS = ("synthetic", "folder", "gpu")
QUICK_PEERS = ("eager", "compile")
# The first tunes for minutes, and on a CPU to nothing better; the second is of use where torchdistill is not.
GPU_PEERS = ("compile-max-autotune", "torchdistill-formula")
EPILOG = """\
further commands:
  python -m bench readme [--check]   write the measured blocks and pictures of README and docs, or check them
  python -m bench plot RECORD ...    draw records, as SVG and PNG beside each
  python -m bench compare A B        ratios of two records, where they can be compared
  python -m bench record VISIT       a record of what a visit to a GPU found, by python -m bench.on_gpu
  python -m bench prediction         epoch times of many GPUs, predicted from the records
  python -m bench guard [RECORD]     measure a few cases again and fail where their ratios are worse than the record's

examples:
  python -m bench all --quick                          a look at everything, not to be quoted
  python -m bench all --shapes imagenet-r50-r18        loss and head of one pair of networks
  python -m bench resources                            what the Triton kernels take of a GPU, without one
  python -m bench ft_loss --quick                      a look, not to be quoted
  python -m bench ft_loss --shapes 64x32x8x8 --dtype float16 --json
  python -m bench ft_head --heads imagenet-r34-r18,32x64:32x8x8 --peers eager
  python -m bench --out bench/records/NAME.json        a record to commit

A candidate that is wrong against the float64 reference gets no figure, and the exit status is then 1.
"""

Value = TypeVar("Value")


def comma_list(what: str, parse: Callable[[str], Value]) -> Callable[[str], tuple[Value, ...]]:
    """An argparse type: values between commas, each read by ``parse``, which raises ValueError with a sentence."""

    def read(text: str) -> tuple[Value, ...]:
        try:
            return tuple(dict.fromkeys(parse(part.strip()) for part in text.split(",")))
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    read.__name__ = what
    return read


def one_of(what: str, choices: dict[str, Value]) -> Callable[[str], Value]:
    """Reads a name that stands for a value."""

    def read(text: str) -> Value:
        if text not in choices:
            raise ValueError(f"{what} {text!r} is unknown; take one of {', '.join(choices)}.")
        return choices[text]

    return read


def positive(text: str) -> int:
    """An argparse type: an integer of at least 1."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer of at least 1.")
    return value


def seed_number(text: str) -> int:
    """An argparse type: an integer from 0 to 2**32."""
    try:
        value = int(text)
    except ValueError:
        value = -1
    if not 0 <= value <= 2**32:
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer from 0 to {2**32}.")
    return value


def peer_names(text: str) -> tuple[str, ...]:
    """An argparse type: peers between commas, or none."""
    if text == "none":
        return ()
    return comma_list("peers", one_of("peer", {name: name for name in PEERS}))(text)


def build_parser(benches: dict[str, Bench]) -> argparse.ArgumentParser:
    """The parser of ``python -m bench``."""
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description="Measure ftfast against its peers, and against what memory and autograd cost alone.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("what", nargs="*", metavar="WHAT", help=f"of {', '.join(benches)}, or {ALL}, the default")
    parser.add_argument("--list", action="store_true", help="say what there is to measure, and stop")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: cuda where it is")
    parser.add_argument(
        "--dtype", type=comma_list("dtypes", one_of("dtype", DTYPES)), metavar="LIST",
        help=f"of {', '.join(DTYPES)}, with commas; default: float32,bfloat16 (--quick: float32); "
        "of heads and their convolutions bfloat16",
    )  # fmt: skip
    parser.add_argument(
        "--shapes", type=comma_list("shapes", parse_shape), metavar="LIST",
        help="factors, by the pair that makes them or as NxCxHxW, with commas; the pairs' heads too, unless --heads: "
        + ", ".join(f"{name} ({shape})" for name, shape in SHAPES.items())
        + f"; default: {','.join(DEFAULT_SHAPES)} (--quick: {','.join(QUICK_SHAPES)})",
    )  # fmt: skip
    parser.add_argument(
        "--heads", type=comma_list("heads", parse_head), metavar="LIST",
        help="heads of ft_head and conv3x3, by the pair that they stand between or as NxSTUDENT+TEACHER:FACTORxHxW, "
        + "with commas: "
        + ", ".join(f"{name} ({shape})" for name, shape in HEADS.items())
        + "; default: " + "; ".join(f"on {device} {','.join(names)}" for device, names in DEFAULT_HEADS.items())
        + f" (--quick: {','.join(QUICK_HEADS)}); on the CPU large ones have a smaller batch",
    )  # fmt: skip
    parser.add_argument(
        "--layouts", type=comma_list("layouts", one_of("layout", {name: name for name in LAYOUTS})), metavar="LIST",
        default=LAYOUTS, help=f"default: {','.join(LAYOUTS)}",
    )  # fmt: skip
    parser.add_argument(
        "--peers", type=peer_names, metavar="LIST",
        help=f"of {', '.join(PEERS)}, with commas, or none; default: all, {', '.join(GPU_PEERS)} on a GPU alone "
        f"(--quick: {', '.join(QUICK_PEERS)})",
    )  # fmt: skip
    parser.add_argument("--threads", type=positive, help="torch's threads, default: the cores that may be used")
    parser.add_argument(
        "--steps", type=positive, help="of the student in preset_run, default: 300 on a GPU, 12 on a CPU"
    )
    parser.add_argument(
        "--loaders", type=comma_list("loaders", one_of("loader", {name: name for name in LOADERS})), metavar="LIST",
        default=(), help=f"of preset_run and loaders, of {', '.join(LOADERS)}; default: synthetic,gpu on a GPU, else "
        "synthetic,folder; of loaders all",
    )  # fmt: skip
    parser.add_argument(
        "--pairs", type=comma_list("pairs", one_of("pair", {name: name for name in PAIRS})), metavar="LIST",
        default=PAIRS, help=f"of networks in distill_step, of {', '.join(PAIRS)}; default: all",
    )  # fmt: skip
    parser.add_argument("--blocks", type=positive, help=f"blocks of each candidate, default: {Plan.blocks}")
    parser.add_argument(
        "--seed", type=seed_number, default=0, help="of the factors and of the order of blocks, default: 0"
    )
    parser.add_argument("--quick", action="store_true", help="few calls on a small shape, to see that it runs")
    parser.add_argument("--json", action="store_true", help="print the record on standard output, and no tables")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the record to FILE")
    parser.add_argument("--overwrite", action="store_true", help="let --out replace a record")
    return parser


def check_out(path: Path, overwrite: bool) -> str:
    """Why the record cannot be written to ``path``, or nothing; asked before minutes are spent on measuring."""
    if path.is_dir():
        return f"--out is {path}, a folder; name a file."
    if not path.parent.is_dir():
        return f"--out is {path} and there is no folder {path.parent}; create it."
    if path.exists() and not overwrite:
        return f"--out is {path}, which exists; name another file, or pass --overwrite."
    if path.exists():
        try:
            load(path)
        except (RecordError, OSError, UnicodeDecodeError):
            return f"--out is {path}, which is not a bench record of this version; name another file."
    try:
        with tempfile.TemporaryFile(dir=path.parent):
            return ""
    except OSError as error:
        return f"--out is {path} and its folder takes no files ({error.strerror}); name another folder."


def settings_from(options: argparse.Namespace, parser: argparse.ArgumentParser) -> Settings:
    """The settings that the arguments ask for."""
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device is cuda and torch finds no CUDA device; take cpu or auto.")
    device = options.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        probe = torch.empty(2, 1, device=device)
        dispatch.choose("auto", probe, probe)
    except (ValueError, RuntimeError) as error:
        parser.error(f"FTFAST_BACKEND cannot be met: {error}")
    plan = QUICK_PLAN if options.quick else Plan()
    plan = replace(plan, blocks=options.blocks or plan.blocks, seed=options.seed)
    names = QUICK_SHAPES if options.quick else DEFAULT_SHAPES
    dtypes = (torch.float32,) if options.quick else (torch.float32, torch.bfloat16)
    peers = QUICK_PEERS if options.quick else tuple(name for name in PEERS if device == "cuda" or name not in GPU_PEERS)
    heads = options.heads or [HEADS[shape.name] for shape in options.shapes or () if shape.name in HEADS]
    heads = heads or [HEADS[name] for name in (QUICK_HEADS if options.quick else DEFAULT_HEADS[device])]
    return Settings(
        device=torch.device(device),
        dtypes=options.dtype or dtypes,
        shapes=options.shapes or tuple(SHAPES[name] for name in names),
        layouts=options.layouts,
        peers=peers if options.peers is None else options.peers,
        plan=plan,
        heads=tuple(dict.fromkeys(head_on(head, device) for head in heads)),
        head_dtypes=options.dtype or (torch.bfloat16,),
        quick=options.quick,
        steps=options.steps,
        loaders=options.loaders,
        pairs=options.pairs,
    )
