"""The head step: paraphraser forward, translator forward and backward, loss; through ``ftfast.FactorTransfer``."""

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch
from rich.table import Table

import ftfast
from bench import peers
from bench.harness import gate
from bench.harness.clocks import graph_replay
from bench.harness.gate import FORWARD, FORWARD_BACKWARD, Candidate, Group
from bench.harness.measuring import measure_groups
from bench.harness.records import Record, Row
from bench.harness.registry import Bench, Settings
from bench.kernels.heads import HeadJudge, Operands, compiled_head, eager_head, operands, our_head, saved_bytes, ways
from bench.kernels.layers import fastest_library
from bench.peers import Loss
from bench.results import tables
from bench.results.throughput import GRAPHED, MATMUL, throughput_markdown, throughput_tables
from ftfast.commands.tune.heads import HeadShape

STEM = "ft_head"
OURS = "ftfast"
LIBRARY = "library + FTLoss"
# By the name that --peers takes.
PEERS = {"eager": peers.EAGER, "compile": peers.COMPILED, "compile-max-autotune": peers.TUNED}
MATMUL_SIZE = {"cpu": 2048, "cuda": 8192}
FORMULA = (
    "FLOPs 18*N*H*W*(the sum over convolutions of C*K): forward the student's and the teacher's three, "
    "forward+backward twice the student's in addition; bytes: forward both feature maps, e bytes an element, and the "
    "float32 parameters of both networks; forward+backward the features' gradient and the translator's parameters' "
    "in addition; copy both feature maps twice"
)


def flops(shape: HeadShape, work: str) -> int:
    """See ``FORMULA``."""
    of_student, of_teacher = (
        18 * shape.pixels * sum(inputs * outputs for inputs, outputs in shape.layers(side))
        for side in ("student", "teacher")
    )
    return of_teacher + (of_student if work == FORWARD else 3 * of_student)


def least_bytes(shape: HeadShape, dtype: torch.dtype, work: str) -> int:
    """See ``FORMULA``."""
    master = max(4, dtype.itemsize)
    student_parameters, teacher_parameters = (
        master * sum(9 * inputs * outputs + outputs for inputs, outputs in shape.layers(side))
        for side in ("student", "teacher")
    )
    student, teacher = (dtype.itemsize * shape.pixels * channels for channels in (shape.student, shape.teacher))
    forward = student + teacher + student_parameters + teacher_parameters
    return forward if work == FORWARD else forward + student + student_parameters


def group_name(shape: HeadShape, dtype: torch.dtype) -> str:
    """The name of a table."""
    title = str(shape) if shape.name == str(shape) else f"{shape.name} {shape}"
    return f"{title}, {str(dtype).removeprefix('torch.')}"


def groups(settings: Settings) -> Iterator[Group]:
    """One group for each head and dtype."""
    for shape in settings.heads:
        for dtype in settings.head_dtypes:
            details = {
                "head": shape.name,
                "dims": list(shape[1:]),
                "dtype": str(dtype).removeprefix("torch."),
                "layout": "channels_last",
                "upstream": 1.0,
            }
            yield Group(STEM, group_name(shape, dtype), details, _builder(settings, shape, dtype))


def _builder(settings: Settings, shape: HeadShape, dtype: torch.dtype) -> Callable[[], list[Candidate]]:
    return lambda: candidates(settings, shape, dtype)


def candidates(settings: Settings, shape: HeadShape, dtype: torch.dtype) -> list[Candidate]:
    """What is compared on one head."""
    with_ = operands(shape, dtype, settings.device, settings.plan.seed)
    student, teacher = with_.student, with_.teacher
    leaves = list(with_.leaves().values())
    judge = HeadJudge(with_, settings.plan.seed)

    def clear() -> None:
        for leaf in leaves:
            leaf.grad = None

    def entries(name: str, loss: Loss, *, is_eager: bool = False, **details: Any) -> list[Candidate]:
        def forward() -> None:
            with torch.no_grad():
                loss(student, teacher)

        def forward_backward() -> None:
            loss(student, teacher).backward()

        @cache
        def verdict() -> gate.Errors:
            return judge(loss, is_eager=is_eager)

        steps = {FORWARD: forward, FORWARD_BACKWARD: forward_backward}
        return [
            Candidate(
                name,
                work,
                step,
                prepare=clear,
                least_bytes=least_bytes(shape, dtype, work),
                gate=verdict,
                details={"flops": flops(shape, work), **details},
            )
            for work, step in steps.items()
        ]

    found: list[Candidate] = []
    eager = eager_head(with_)
    if "eager" in settings.peers:
        found += entries(peers.EAGER, eager, is_eager=True, saved_bytes=saved_bytes(eager, with_))
    if "compile" in settings.peers:
        compiled = compiled_head(with_)
        found += entries(peers.COMPILED, compiled, saved_bytes=saved_bytes(compiled, with_))
    if "compile-max-autotune" in settings.peers:
        tuned = compiled_head(with_, "max-autotune-no-cudagraphs")
        found += entries(peers.TUNED, tuned, saved_bytes=saved_bytes(tuned, with_))
    library = eager_head(with_, ftfast.FTLoss())
    found += entries(LIBRARY, library, saved_bytes=saved_bytes(library, with_))
    ours = our_head(with_)
    with with_.autocast():
        explained = with_.head.explain(student, teacher)
    found += entries(OURS, ours, saved_bytes=saved_bytes(ours, with_), backend=explained)
    if settings.device.type == "cuda":
        found += [entry for way, loss in ways(with_).items() for entry in entries(f"{OURS}, {way}", loss)]
        found += [graph_replay(candidate) for candidate in found]
    return found + _ceilings(settings, with_)


def _ceilings(settings: Settings, with_: Operands) -> list[Candidate]:
    size = 256 if settings.quick else MATMUL_SIZE[settings.device.type]
    left, right = (torch.empty(size, size, dtype=with_.dtype, device=settings.device).uniform_(-1, 1) for _ in "ab")
    features = [with_.student.detach(), with_.teacher]
    destinations = [torch.empty_like(tensor) for tensor in features]

    def copy_features() -> None:
        for destination, tensor in zip(destinations, features, strict=True):
            destination.copy_(tensor)

    moved = 2 * sum(tensor.nbytes for tensor in features)
    return [
        Candidate(MATMUL, MATMUL, lambda: left @ right, details={"flops": 2 * size**3, "size": size}),
        Candidate(peers.COPY, peers.COPY, copy_features, least_bytes=moved),
    ]


def size(settings: Settings) -> int:
    """How often :func:`run` reports progress."""
    heads = 2 + sum(name in settings.peers for name in PEERS)
    if settings.device.type == "cuda":
        heads = 2 * (heads + 2)  # each way too, and all as a graph
    of_group = 2 * heads + 2  # two works each; the matmul and the copy
    return len(settings.heads) * len(settings.head_dtypes) * of_group * (1 + settings.plan.blocks)


def run(settings: Settings, advance: Callable[[str], None]) -> list[Row]:
    """Measure every group."""
    with fastest_library():
        return measure_groups(groups(settings), settings.device, settings.plan, advance)


def show(rows: list[Row]) -> Iterator[Table]:
    """One table for each head."""
    kept = {"saved MiB": "saved_bytes"}
    if any("peak_bytes" in row.details for row in rows):
        kept["peak MiB"] = "peak_bytes"
    return throughput_tables(rows, {"over eager": peers.EAGER, "over compile": peers.COMPILED}, kept)


def markdown(newest: dict[str, tuple[str, Record]], brief: bool = False) -> str:
    """The block of the README and of docs/benchmarks.md."""

    def found_in(_: str, record: Record) -> tuple[str, list[str]]:
        rows = record.of(STEM)
        shown = []
        for suffix in ("", f", {GRAPHED}"):
            names = [name + suffix for name in (peers.EAGER, peers.COMPILED, LIBRARY, OURS)]
            if suffix and not any(row.candidate in names for row in rows):
                continue
            shown.append(
                throughput_markdown(rows, FORWARD_BACKWARD, names, OURS + suffix, [peers.EAGER, peers.COMPILED], "head")
            )
        return ". Medians of forward and backward", shown

    return tables.by_device(newest, found_in, brief)


BENCH = Bench(
    summary="the head step through FactorTransfer against eager modules, torch.compile of them, and torch convolutions",
    size=size,
    run=run,
    tables=show,
    markdown=markdown,
    formula=FORMULA,
)
