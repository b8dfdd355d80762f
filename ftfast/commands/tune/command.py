"""``ftfast tune``: measures which kernel is fastest for each choice of a head on this machine, and keeps the table."""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from ftfast.commands.tune.candidates import DTYPES, jobs
from ftfast.commands.tune.heads import HEADS, HeadShape, parse_head
from ftfast.commands.tune.measuring import agreeing, captured, median_milliseconds
from ftfast.dispatch import supports
from ftfast.ops import kernel_table
from ftfast.ops.kernel_table import Work

TUNED = {name: HEADS[name] for name in ("cifar-r56-r20", "cifar-wrn40x2-wrn16x2", "imagenet-r34-r18")}
"""What is measured unless heads are given."""
TUNED["imagenet-r34-r18-small-batch"] = HEADS["imagenet-r34-r18"]._replace(samples=32)


def _head(text: str) -> HeadShape:
    try:
        return TUNED.get(text) or parse_head(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error).rstrip(".")) from None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    names = ", ".join(HEADS | TUNED)
    parser.add_argument("heads", nargs="*", type=_head, metavar="HEAD", help=f"of {names}; or its sizes")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", action="append", choices=list(DTYPES), help="bfloat16 unless given; repeatable")
    parser.add_argument("--seconds", type=float, default=0.3, help="for each block of a kernel, of which it gets 5")
    parser.add_argument("--out", type=Path, help="the table's file; by default the one that ftfast reads")
    parser.add_argument("--json", action="store_true", help="print the entries as JSON instead of a table")


def run(args: argparse.Namespace) -> int:
    try:
        device = torch.device(args.device)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        return _refuse(f"device is {args.device!r}, which cannot be used: {str(error).splitlines()[0]}")
    if not 0 < args.seconds < 3600:
        return _refuse(f"seconds is {args.seconds}; it takes a number above 0")
    backend = "native" if device.type == "cpu" else "triton"
    support = supports(backend, device, torch.float32, torch.float32)
    if not support.ok:
        return _refuse(f"there are no kernels to choose from here: {support.reason}")
    path = args.out
    if path is None:
        if (folder := kernel_table.table_folder()) is None:
            return _refuse("there is no home folder to keep the table in; give --out, or set FTFAST_CACHE to a folder")
        path = folder / kernel_table.file_name(device)
    try:
        entries = kernel_table.read_table(path)
    except ValueError as error:
        return _refuse(str(error).rstrip("."))
    path.parent.mkdir(parents=True, exist_ok=True)
    measured = []
    for entry in _measure_all(args.heads or list(TUNED.values()), args.dtype or ["bfloat16"], device, args.seconds):
        measured.append(entry)
        entries = [old for old in entries if _work(old) != _work(entry)] + [entry]
        _write(path, device, entries)
        kernel_table.forget_tables()
    print(json.dumps(measured, indent=1) if args.json else _table(measured))
    print(f"{len(measured)} choices written to {path}.", file=sys.stderr)
    return 0


def _refuse(sentence: str) -> int:
    print(f"ftfast tune: error: {sentence}.", file=sys.stderr)
    return 2


def _measure_all(
    heads: list[HeadShape], dtypes: list[str], device: torch.device, seconds: float
) -> Iterator[dict[str, Any]]:
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    found = [job for head in heads for dtype in dtypes for job in jobs(head, DTYPES[dtype], device)]
    found = list({job[0]: job for job in found}.values())
    with Progress(console=console, disable=not console.is_terminal, transient=True) as progress:
        task = progress.add_task("tuning", total=len(found))
        for work, build in found:
            progress.update(task, description=f"{work.operation} {work.channels_in}->{work.channels_out}")
            candidates = agreeing(build(), work)
            if device.type == "cuda":
                candidates = captured(candidates, work, device)
            if len(candidates) > 1:
                yield _entry(work, median_milliseconds(candidates, device, seconds), device)
            progress.advance(task)


def _entry(work: Work, times: dict[str, float], device: torch.device) -> dict[str, Any]:
    fastest = min(times, key=times.__getitem__)
    rounded = {kernel: round(ms, 4) for kernel, ms in times.items()}
    versions: dict[str, Any] = {"torch": str(torch.__version__)}
    if device.type == "cpu":
        versions["threads"] = torch.get_num_threads()
    return {**work._asdict(), "kernel": fastest, "milliseconds": rounded, **versions}


def _work(entry: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(entry.get(field) for field in Work._fields)


def _write(path: Path, device: torch.device, entries: list[dict[str, Any]]) -> None:
    table = {"version": kernel_table.VERSION, "device": kernel_table.device_name(device), "entries": entries}
    aside = path.with_name(path.name + ".tmp")
    aside.write_text(json.dumps(table, indent=1) + "\n")
    aside.replace(path)


def _table(entries: list[dict[str, Any]]) -> str:
    lines = [f"{'work':<18}{'dtype':<10}{'maps':<14}{'channels':<14}{'fastest':<14}milliseconds"]
    for entry in entries:
        maps = f"{entry['samples']}x{entry['height']}x{entry['width']}"
        channels = f"{entry['channels_in']}->{entry['channels_out']}"
        times = ", ".join(f"{kernel} {ms:.3f}" for kernel, ms in entry["milliseconds"].items())
        cells = f"{entry['operation']:<18}{entry['dtype']:<10}{maps:<14}{channels:<14}{entry['kernel']:<14}"
        lines.append(cells + times)
    return "\n".join(lines)
