"""The loss alone, through ``ftfast.FTLoss``, against the official formula, torch.compile of it and yardstick F."""

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import ftfast
from bench import peers, tables
from bench.candidates import FORWARD, FORWARD_BACKWARD, Candidate, Group
from bench.clocks import clock_for, graph_replay
from bench.gate import Gate, Judge
from bench.measuring import measure_group
from bench.records import Record, Row
from bench.registry import Bench, Settings
from bench.shapes import DEFAULT_SHAPES, SHAPES, FactorShape

STEM = "ft_loss"
OURS = "ftfast"
OTHER_UPSTREAM = 512.0
LAYOUTS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}
README_DTYPES = (torch.float32, torch.bfloat16)
# Below this a step is over before Python has launched the next one, and a CUDA graph is the usual way to run it.
LAUNCH_BOUND_NUMEL = 2**20
FORMULA = (
    "forward 2*N*D*e (both factors read), e bytes an element; forward+backward 3*N*D*e (the gradient written too) "
    "where the gradient written in the forward pass can be the final one: 32 and 64 bit with upstream gradient 1; "
    "5*N*D*e otherwise, since it is computed again or multiplied once the upstream gradient is known; "
    "copy 2*N*D*e; yardstick F 3*N*D*e"
)


def group_name(shape: FactorShape, dtype: torch.dtype, layout: str) -> str:
    """The name of a table."""
    title = str(shape) if shape.name == str(shape) else f"{shape.name} {shape}"
    return f"{title}, {dtype_name(dtype)}, {layout}"


def dtype_name(dtype: torch.dtype) -> str:
    """``float32`` for ``torch.float32``."""
    return str(dtype).removeprefix("torch.")


def groups(settings: Settings) -> Iterator[Group]:
    """One group for each shape, dtype and layout."""
    for shape in settings.shapes:
        for dtype in settings.dtypes:
            for layout in settings.layouts:
                details = {
                    "shape": shape.name,
                    "dims": list(shape.dims),
                    "dtype": dtype_name(dtype),
                    "layout": layout,
                    "teacher_layout": layout,
                    "upstream": 1.0,
                }
                yield Group(STEM, group_name(shape, dtype, layout), details, _builder(settings, shape, dtype, layout))


def _builder(settings: Settings, shape: FactorShape, dtype: torch.dtype, layout: str) -> Callable[[], list[Candidate]]:
    return lambda: candidates(settings, shape, dtype, layout)


def factors(shape: FactorShape, dtype: torch.dtype, layout: str, device: torch.device, seed: int) -> list[Tensor]:
    """A student and a teacher factor as the last LeakyReLU leaves them; the student's requires a gradient."""
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (
        F.leaky_relu(torch.randn(shape.dims, generator=generator), 0.1)
        .to(device=device, dtype=dtype)
        .contiguous(memory_format=LAYOUTS[layout])
        for _ in range(2)
    )
    return [student.requires_grad_(), teacher]


def candidates(settings: Settings, shape: FactorShape, dtype: torch.dtype, layout: str) -> list[Candidate]:
    """What is compared on one pair of factors."""
    student, teacher = factors(shape, dtype, layout, settings.device, settings.plan.seed)
    other_layout = next(name for name in LAYOUTS if name != layout)
    unlike_teacher = teacher.contiguous(memory_format=LAYOUTS[other_layout])
    judge = Judge(student, teacher, settings.plan.seed)
    factor_bytes = shape.numel * dtype.itemsize

    def clear() -> None:
        student.grad = None

    def entries(
        name: str,
        loss: peers.Loss,
        *,
        teacher: Tensor = teacher,
        upstream: float = 1.0,
        works: tuple[str, ...] = (FORWARD, FORWARD_BACKWARD),
        judged: bool = True,
        rounds_throughout: bool = False,
        moved: int | None = None,
        **details: Any,
    ) -> list[Candidate]:
        # A plain backward() for 1, as training scripts have it; the tensor stands for a loss weight or an AMP scale.
        gradient = None if upstream == 1.0 else torch.tensor(upstream, device=settings.device)

        def forward() -> None:
            with torch.no_grad():
                loss(student, teacher)

        def forward_backward() -> None:
            loss(student, teacher).backward(gradient)

        @cache
        def gate() -> Gate:
            return judge(loss, student, teacher, rounds_throughout=rounds_throughout and dtype.itemsize < 4)

        steps = {FORWARD: forward, FORWARD_BACKWARD: forward_backward}
        return [
            Candidate(
                name=name,
                work=work,
                step=steps[work],
                prepare=clear,
                least_bytes=factor_bytes * (moved or least_factors(work, dtype, upstream)),
                gate=gate if judged else None,
                details={"upstream": upstream, **details},
            )
            for work in works
        ]

    found: list[Candidate] = []
    for peer in settings.peers:
        name, build = peers.PEERS[peer]
        found += entries(name, build(), rounds_throughout=True)
    found += entries(peers.YARDSTICK, peers.yardstick, judged=False, moved=3)
    ours = ftfast.FTLoss()
    backend = ftfast.explain(student, teacher).partition(" ")[0]
    found += entries(OURS, ours, backend=backend)
    both = (FORWARD_BACKWARD,)
    found += entries(f"{OURS}, upstream {OTHER_UPSTREAM:g}", ours, upstream=OTHER_UPSTREAM, works=both, backend=backend)
    found += entries(
        f"{OURS}, teacher {other_layout}", ours, teacher=unlike_teacher, works=both,
        teacher_layout=other_layout, backend=backend,
    )  # fmt: skip
    if settings.device.type == "cuda" and shape.numel < LAUNCH_BOUND_NUMEL:
        graphed = [candidate for candidate in found if candidate.work == FORWARD_BACKWARD]
        found += [graph_replay(candidate) for candidate in graphed if candidate.name in (peers.EAGER, OURS)]
    destination = torch.empty_like(teacher)
    found.append(Candidate(peers.COPY, "copy", lambda: destination.copy_(teacher), least_bytes=2 * factor_bytes))
    return found


def least_factors(work: str, dtype: torch.dtype, upstream: float) -> int:
    """How many factors' worth of memory traffic the work needs at least; see ``FORMULA``."""
    if work == FORWARD:
        return 2
    return 3 if upstream == 1.0 and dtype.itemsize >= 4 else 5


def size(settings: Settings) -> int:
    """How often :func:`run` reports progress."""
    shapes = [shape for shape in settings.shapes for _ in settings.dtypes for _ in settings.layouts]
    total = 0
    for shape in shapes:
        graphs = settings.device.type == "cuda" and shape.numel < LAUNCH_BOUND_NUMEL
        # Two for each peer, the yardstick and ours; two more of ours; the copy; the graphs of eager and ours.
        total += 2 * (len(settings.peers) + 2) + 3 + (graphs * (1 + ("eager" in settings.peers)))
    return total * (1 + settings.plan.blocks)


def run(settings: Settings, advance: Callable[[str], None]) -> list[Row]:
    """Measure every group."""
    clock = clock_for(settings.device)
    rows = []
    for group in groups(settings):

        def advance_in_group(candidate: str, name: str = group.name) -> None:
            advance(f"{name}: {candidate}")

        rows += measure_group(group, clock, settings.plan, advance_in_group)
    return rows


def markdown(newest: dict[str, tuple[str, Record]]) -> str:
    """The README's block."""
    names = [
        group_name(SHAPES[shape], dtype, layout)
        for shape in DEFAULT_SHAPES
        for dtype in README_DTYPES
        for layout in LAYOUTS
    ]
    blocks = []
    for device, title in (("cpu", "CPU"), ("cuda", "CUDA GPU")):
        if device not in newest:
            blocks.append(f"{title}: {tables.NOT_MEASURED}.")
            continue
        picture, record = newest[device]
        rows = record.of(STEM)
        backends = {row.details.get("backend") for row in rows if row.candidate == OURS}
        blocks.append(
            f"{title}: {tables.provenance(record)}, backend {', '.join(sorted(map(str, backends)))}. "
            f"Medians of forward and backward.{''.join(f' Note: {note}.' for note in record.notes)}"
        )
        blocks.append(tables.comparison_markdown(rows, OURS, names))
        blocks.append(f"![Time of the loss against the yardstick and the official formula]({picture})")
    return "\n\n".join(blocks)


BENCH = Bench(
    summary="FTLoss, forward and forward+backward, against the official formula, torch.compile of it and yardstick F",
    size=size,
    run=run,
    tables=tables.comparison_tables,
    markdown=markdown,
    formula=FORMULA,
)
