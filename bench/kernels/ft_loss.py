"""The loss alone, through ``ftfast.FTLoss``, against other implementations of it and yardstick F."""

from collections.abc import Callable, Iterator

import torch

import ftfast
from bench import peers
from bench.harness.clocks import graph_replay
from bench.harness.gate import FORWARD, FORWARD_BACKWARD, STEPS, Candidate, Group
from bench.harness.measuring import measure_groups
from bench.harness.records import Record, Row
from bench.harness.registry import Bench, Settings
from bench.kernels.ceilings import copy_candidate
from bench.kernels.loss_cases import FORMULA, LAYOUTS, WORKS, LossCases
from bench.peers import NotInstalledError
from bench.results import tables
from bench.shapes import DEFAULT_SHAPES, SHAPES, FactorShape
from ftfast import dispatch
from ftfast.arguments import Backend

STEM = "ft_loss"
OURS = "ftfast"
OTHER_UPSTREAM = 512.0
# The backends that have kernels for GPUs, and what is measured as a graph's replay too.
KERNELS: tuple[Backend, ...] = ("native", "triton")
OF_BACKEND: dict[str, str] = {name: f"{OURS}, {name}" for name in KERNELS}
TORCHDISTILL = {peers.PEERS[name].title for name in ("torchdistill", "torchdistill-formula")}
REPLAYED = {peers.EAGER, peers.COMPILED, *TORCHDISTILL, OURS, *OF_BACKEND.values()}
README_DTYPES = (torch.float32, torch.bfloat16)


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


def candidates(settings: Settings, shape: FactorShape, dtype: torch.dtype, layout: str) -> list[Candidate]:
    """What is compared on one pair of factors."""
    cases = LossCases(shape, dtype, layout, settings.device, settings.plan.seed)
    found: list[Candidate] = []
    for name in peers_on(settings, dtype):
        peer = peers.PEERS[name]
        try:
            loss = peer.build()
        except NotInstalledError:
            continue  # absent_peers() gives it a row
        details = {**peer.details(), **cases.kept_by(loss)}
        found += cases.entries(peer.title, loss, formula=peer.formula, rounds_throughout=True, **details)
    kept = cases.kept_by(peers.yardstick)
    # Its backward hands over what forward wrote.
    works = (FORWARD, FORWARD_BACKWARD)
    found += cases.entries(peers.YARDSTICK, peers.yardstick, works=works, formula=None, moved=3, **kept)
    found += our_entries(cases, layout)
    # A step is over before Python has launched the next one, and a graph is the usual way to run it.
    if settings.device.type == "cuda":
        found += [entry for backend in KERNELS for entry in backend_entries(cases, backend)]
        graphed = [candidate for candidate in found if candidate.work == FORWARD_BACKWARD]
        found += [graph_replay(candidate) for candidate in graphed if candidate.name in REPLAYED]
    return [*found, copy_candidate(cases.teacher)]


def our_entries(cases: LossCases, layout: str) -> list[Candidate]:
    """The public loss, under another upstream gradient and with a teacher's factor of another layout too."""
    other_layout = next(name for name in LAYOUTS if name != layout)
    unlike_teacher = cases.teacher.contiguous(memory_format=LAYOUTS[other_layout])
    ours, both = ftfast.FTLoss(), (FORWARD_BACKWARD,)
    for _ in range(STEPS):
        loss = ours(cases.student, cases.teacher)
        graph = loss.grad_fn
        loss.backward()
    details = {
        "backend": ftfast.explain(cases.student, cases.teacher).partition(" ")[0],
        "gradient_in_forward": getattr(graph, "written_for", None) is not None,
        **cases.kept_by(ours),
    }
    other_upstream, other_teacher = f"{OURS}, upstream {OTHER_UPSTREAM:g}", f"{OURS}, teacher {other_layout}"
    return [
        *cases.entries(OURS, ours, **details),
        *cases.entries(other_upstream, ours, upstream=OTHER_UPSTREAM, works=both, **details),
        *cases.entries(other_teacher, ours, teacher=unlike_teacher, works=both, teacher_layout=other_layout, **details),
    ]


def backend_entries(cases: LossCases, backend: Backend) -> list[Candidate]:
    """The public loss on one backend, forward and backward; nothing where that cannot run."""
    device, student, teacher = cases.student.device, cases.student.dtype, cases.teacher.dtype
    if not dispatch.supports(backend, device, student, teacher).ok:
        return []
    return cases.entries(OF_BACKEND[backend], ftfast.FTLoss(backend=backend), works=(FORWARD_BACKWARD,))


def peers_on(settings: Settings, dtype: torch.dtype) -> list[str]:
    """The peers that are measured on factors of a dtype."""
    return [name for name in settings.peers if peers.PEERS[name].takes(dtype)]


def absent_peers(settings: Settings) -> dict[str, str]:
    """Why peers that were asked for cannot be measured, by their name."""
    found = {}
    for name in settings.peers:
        try:
            peers.PEERS[name].build()
        except NotInstalledError as error:
            found[name] = str(error)
    return found


def size(settings: Settings) -> int:
    """How often :func:`run` reports progress."""
    total = 0
    absent = absent_peers(settings)
    for dtype in settings.dtypes:
        present = [name for name in peers_on(settings, dtype) if name not in absent]
        installed, graphs = len(present), 0
        if settings.device.type == "cuda":
            kernels = [name for name in KERNELS if dispatch.supports(name, settings.device, dtype, dtype).ok]
            graphs = 1 + 2 * len(kernels) + sum(peers.PEERS[name].title in REPLAYED for name in present)
        # The works of each peer and of ours; two of the yardstick; two more of ours; the copy; the graphs.
        total += len(WORKS) * (installed + 1) + 2 + 2 + 1 + graphs
    return total * len(settings.shapes) * len(settings.layouts) * (1 + settings.plan.blocks)


def run(settings: Settings, advance: Callable[[str], None]) -> list[Row]:
    """Measure every group."""
    absent = absent_peers(settings)

    def not_installed(group: Group) -> Iterator[Row]:
        for name, reason in absent.items():
            details = {**group.details, "not_installed": True}
            yield Row(STEM, group.name, peers.PEERS[name].title, FORWARD_BACKWARD, None, None, None, reason, details)

    return measure_groups(groups(settings), settings.device, settings.plan, advance, not_installed)


def markdown(newest: dict[str, tuple[str, Record]], brief: bool = False) -> str:
    """The block of the README and of docs/benchmarks.md."""

    names = [
        group_name(SHAPES[shape], dtype, layout)
        for shape in DEFAULT_SHAPES
        for dtype in README_DTYPES
        for layout in LAYOUTS
    ]

    def found_in(picture: str, record: Record) -> tuple[str, list[str]]:
        rows = record.of(STEM)
        backends = {row.details.get("backend") for row in rows if row.candidate == OURS}
        shown = [tables.comparison_markdown(rows, OURS, names)]
        if further := tables.peers_markdown(rows, OURS, names):
            shown.append(f"Further peers, and their times in multiples of {OURS}'s:\n\n{further}")
        shown.append(f"![Time of the loss against the yardstick and the official formula]({picture})")
        return f", backend {', '.join(sorted(map(str, backends)))}. Medians of forward and backward", shown

    return tables.by_device(newest, found_in, brief)


BENCH = Bench(
    summary="FTLoss, forward, backward and both, against other implementations, torch.compile and yardstick F",
    size=size,
    run=run,
    tables=tables.comparison_tables,
    markdown=markdown,
    formula=FORMULA,
)
