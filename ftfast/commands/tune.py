"""``ftfast tune``: measures which kernel is fastest for each choice of a head on this machine, and keeps the table.

On a GPU each candidate is captured as a CUDA graph whose replays are timed: between two ways of computing a small head,
what Python and the launches cost would decide otherwise, and a captured step does not pay it.
"""

import argparse
import json
import math
import random
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ftfast.backends import Options
from ftfast.dispatch import supports
from ftfast.modules import Paraphraser, Translator, convolution_stack
from ftfast.ops import kernel_table
from ftfast.ops.conv3x3 import native as conv3x3_native
from ftfast.ops.ft_head import function as ft_head
from ftfast.ops.ft_head.operands import Plan
from ftfast.ops.ft_head.stack import Stack
from ftfast.ops.kernel_table import Work

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
# Two kernels for one result may differ by this much, relative to it; TF32 rounds float32 operands.
AGREEMENT = {torch.bfloat16: 2e-2, torch.float16: 4e-3, torch.float32: 4e-3}
BLOCKS = 5
REPLAYS = 20  # of a graph that are timed as one: an event's own time is a microsecond


class HeadShape(NamedTuple):
    """A head's features: both sides' channels, the factor's, and the map."""

    samples: int
    student: int
    teacher: int
    factor: int
    height: int
    width: int

    def __str__(self) -> str:
        return f"{self.samples}x{self.student}+{self.teacher}:{self.factor}x{self.height}x{self.width}"

    def layers(self) -> list[tuple[int, int]]:
        """``(channels_in, channels_out)`` of every convolution, each once."""
        found = [(side, side) for side in (self.student, self.teacher)]
        found += [(side, self.factor) for side in (self.student, self.teacher)] + [(self.factor, self.factor)]
        return list(dict.fromkeys(found))


HEADS = {
    "cifar-r56-r20": HeadShape(128, 64, 64, 32, 8, 8),
    "cifar-wrn40x2-wrn16x2": HeadShape(128, 128, 128, 64, 8, 8),
    "imagenet-r34-r18": HeadShape(256, 512, 512, 256, 7, 7),
    "imagenet-r34-r18-small-batch": HeadShape(32, 512, 512, 256, 7, 7),
}


class Candidate(NamedTuple):
    """One kernel for a piece of work; ``run`` gives the results that all candidates have to agree on."""

    kernel: str
    run: Callable[[], Sequence[Tensor]]


def parse_head(text: str) -> HeadShape:
    """A head by its name, or written as NxSTUDENT+TEACHER:FACTORxHxW."""
    if text in HEADS:
        return HEADS[text]
    match = re.fullmatch(r"(\d+)x(\d+)\+(\d+):(\d+)x(\d+)x(\d+)", text)
    if match is None or "0" in match.groups():
        names = ", ".join(HEADS)
        raise argparse.ArgumentTypeError(
            f"head is {text!r}; it takes {names}, or NxSTUDENT+TEACHER:FACTORxHxW as in 128x64+64:32x8x8"
        )
    return HeadShape(*map(int, match.groups()))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    names = ", ".join(HEADS)
    parser.add_argument("heads", nargs="*", type=parse_head, metavar="HEAD", help=f"of {names}; or its sizes")
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
    for entry in _measure_all(args.heads or list(HEADS.values()), args.dtype or ["bfloat16"], device, args.seconds):
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
    jobs = [job for head in heads for dtype in dtypes for job in _jobs(head, DTYPES[dtype], device)]
    jobs = list({job[0]: job for job in jobs}.values())
    with Progress(console=console, disable=not console.is_terminal, transient=True) as progress:
        task = progress.add_task("tuning", total=len(jobs))
        for work, build in jobs:
            progress.update(task, description=f"{work.operation} {work.channels_in}->{work.channels_out}")
            candidates = _agreeing(build(), work)
            if device.type == "cuda":
                candidates = _captured(candidates, work, device)
            if len(candidates) > 1:
                yield _entry(work, _time(candidates, device, seconds), device)
            progress.advance(task)


def _jobs(
    head: HeadShape, dtype: torch.dtype, device: torch.device
) -> Iterator[tuple[Work, Callable[[], list[Candidate]]]]:
    """What there is to choose for a head: on the CPU its weight gradients' kernels, on a GPU the way to compute it."""
    name = str(dtype).removeprefix("torch.")
    place = head.samples, head.height, head.width
    if device.type != "cpu":
        yield Work("head", name, *place, head.student, head.factor), partial(_heads, head, dtype, device)
    elif dtype != torch.float16:
        for channels, outputs in head.layers():
            work = Work("weight_gradient", name, *place, channels, outputs)
            yield work, partial(_weight_gradients, work, dtype)


def _weight_gradients(work: Work, dtype: torch.dtype) -> list[Candidate]:
    generator = torch.Generator().manual_seed(0)
    x, dz = (
        torch.randn(work.samples, channels, work.height, work.width, generator=generator)
        .to(dtype)
        .contiguous(memory_format=torch.channels_last)
        for channels in (work.channels_in, work.channels_out)
    )
    parameter = torch.randn(work.channels_out, work.channels_in, 3, 3, generator=generator)

    def compute(kernel: str) -> list[Tensor]:
        _, found = conv3x3_native.gradients(x, dz, parameter, need_input=False, kernel=kernel)
        assert found is not None
        return [found]

    kernels = conv3x3_native.candidates(work.channels_in, work.channels_out)
    return [Candidate(kernel, partial(compute, kernel)) for kernel in kernels]


def _heads(head: HeadShape, dtype: torch.dtype, device: torch.device) -> list[Candidate]:
    """A step of the head, forward and backward, by each way that can compute it."""
    from ftfast.ops.ft_head import triton as ft_head_triton

    torch.manual_seed(0)
    paraphraser = Paraphraser(head.teacher, factor_channels=head.factor).to(device).requires_grad_(False)
    translator = Translator(head.student, head.factor).to(device)
    of_student, of_teacher = convolution_stack(translator), convolution_stack(paraphraser)
    assert isinstance(of_student, Stack)
    assert isinstance(of_teacher, Stack)
    student, teacher = (
        torch.randn(head.samples, channels, head.height, head.width, device=device, dtype=dtype)
        .contiguous(memory_format=torch.channels_last)
        .requires_grad_(side == "student")
        for side, channels in (("student", head.student), ("teacher", head.teacher))
    )
    options = Options(1, "mean", 1e-12, 1.0)

    def step(kernel: str) -> Sequence[Tensor]:
        plan = Plan(kernel, "triton", dtype, "tuning")
        # Held, as training holds the paraphraser: its weights are prepared once.
        loss = ft_head.run(
            student, teacher, None, plan, of_student, of_teacher, options, held=0
        )  # prepared once, as in training
        return torch.autograd.grad(loss, [student, *translator.parameters()])

    shape = (head.samples, head.student, head.height, head.width)
    ways = ft_head_triton.candidates(device, dtype, shape, head.factor, head.teacher)
    return [Candidate(kernel, partial(step, kernel)) for kernel in ways]


def _agreeing(candidates: list[Candidate], work: Work) -> list[Candidate]:
    """The candidates that run and give the first one's results; the others are named, and not timed."""
    kept: list[Candidate] = []
    wanted: list[Tensor] = []
    for candidate in candidates:
        try:
            found = [result.double() for result in candidate.run()]
        except (RuntimeError, ValueError) as error:
            _leave_out(candidate, work, error)
            continue
        wanted = wanted or found
        errors = [((got - right).norm() / right.norm()).item() for got, right in zip(found, wanted, strict=True)]
        difference = math.sqrt(sum(error * error for error in errors) / len(errors))
        # A sum over samples of signs that rounding may flip agrees less closely than one product does.
        bound = AGREEMENT[DTYPES[work.dtype]] * (10 if work.operation == "head" else 1)
        if difference <= bound:
            kept.append(candidate)
        else:
            print(f"ftfast tune: {candidate.kernel} is off by {difference:.1e} for {work}; left out.", file=sys.stderr)
    return kept


def _leave_out(candidate: Candidate, work: Work, error: Exception) -> None:
    print(f"ftfast tune: {candidate.kernel} cannot compute {work}: {error}", file=sys.stderr)


def _captured(candidates: list[Candidate], work: Work, device: torch.device) -> list[Candidate]:
    """The candidates as replays of CUDA graphs; one that cannot be captured is named, and not timed."""
    kept = []
    with torch.cuda.device(device):
        for candidate in candidates:
            graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            try:
                # Backward remembers the stream of forward: all of it belongs on the one that is captured.
                with torch.cuda.stream(stream):
                    candidate.run()
                with torch.cuda.graph(graph, stream=stream):
                    results = candidate.run()
            except (RuntimeError, ValueError) as error:
                _leave_out(candidate, work, error)
                continue
            kept.append(Candidate(candidate.kernel, partial(_replay, graph, results)))
    return kept


def _replay(graph: torch.cuda.CUDAGraph, results: Sequence[Tensor]) -> Sequence[Tensor]:
    graph.replay()
    return results


def _time(candidates: list[Candidate], device: torch.device, seconds: float) -> dict[str, float]:
    """Median milliseconds of each, in blocks of its own that come in random order."""
    order = [candidate for candidate in candidates for _ in range(BLOCKS)]
    random.Random(0).shuffle(order)
    found: dict[str, list[float]] = {candidate.kernel: [] for candidate in candidates}
    for candidate in order:
        for _ in range(2):
            candidate.run()
        until = time.perf_counter() + seconds
        while time.perf_counter() < until or len(found[candidate.kernel]) < 3:
            found[candidate.kernel].append(_milliseconds(candidate, device))
    return {kernel: statistics.median(times) for kernel, times in found.items()}


def _milliseconds(candidate: Candidate, device: torch.device) -> float:
    """Of one run; on a GPU by its own clock, of some runs back to back."""
    if device.type != "cuda":
        start = time.perf_counter()
        candidate.run()
        return 1e3 * (time.perf_counter() - start)
    with torch.cuda.device(device):
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        for _ in range(REPLAYS):
            candidate.run()
        last.record()
        last.synchronize()
    return float(first.elapsed_time(last)) / REPLAYS


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
