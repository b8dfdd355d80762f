"""The roofline of a bench: FLOP/s over FLOPs a byte, under the bandwidth and the matmuls of the same record."""

from collections.abc import Sequence
from pathlib import Path

from bench.harness.gate import BACKWARD, FORWARD
from bench.harness.records import Record, Row
from bench.peers import COPY
from bench.results import drawing
from bench.results.drawing import STYLES
from bench.results.throughput import MATMUL, rate

# In conv3x3 a forward is a work of its own; of a loss or a head, both passes are what a training step does.
WHOLE_STEPS = ("ft_loss", "ft_head", "scaling")


def picture_name(bench: str) -> str:
    """The roofline's, beside the bench's other picture."""
    return f"{bench}.roofline"


def points(rows: Sequence[Row]) -> list[tuple[Row, float, float]]:
    """``(row, FLOPs a byte, GFLOP/s)`` of every row that counts both and that the picture shows."""
    found = []
    for row in rows:
        parted = row.bench in WHOLE_STEPS and row.work in (FORWARD, BACKWARD)
        tflops = rate(row)
        if tflops and row.least_bytes and row.candidate in STYLES and not parted:
            found.append((row, row.details["flops"] / row.least_bytes, 1e3 * tflops))
    return found


def bandwidths(record: Record) -> dict[str, float]:
    """GB/s by what they are of: a copy that no cache holds, and the fastest copy of all."""
    copies = [row for row in record.rows if row.candidate == COPY and row.gbps]
    large = max((row.gbps or 0.0 for row in copies if row.bench == "ceilings"), default=0.0)
    any_size = max((row.gbps or 0.0 for row in copies), default=0.0)
    found = {"copy, larger than the caches": large} if large else {}
    if any_size > 1.1 * large:
        found["fastest copy"] = any_size
    return found


def matmul_rates(record: Record) -> dict[str, float]:
    """GFLOP/s of the fastest matmul by dtype."""
    found: dict[str, float] = {}
    for row in record.rows:
        if row.candidate == MATMUL and (tflops := rate(row)):
            dtype = row.details.get("dtype", "")
            found[dtype] = max(found.get(dtype, 0.0), 1e3 * tflops)
    return found


def plot(record: Record, bench: str, paths: tuple[Path, Path]) -> list[Path]:
    """Draw it; nothing where the record has no row with FLOPs and bytes, or no bandwidth."""
    found, roofs, peaks = points(record.of(bench)), bandwidths(record), matmul_rates(record)
    if not found or not roofs:
        return []
    intensities = [intensity for _, intensity, _ in found]
    heights = [height for *_, height in found]
    fastest = max(roofs.values())
    bends = [peak / fastest for peak in peaks.values()]
    left, right = min([*intensities, *bends]) / 4, max([*intensities, *bends]) * 6
    with drawing.figure(8.5, 5.4) as figure:
        axes = figure.subplots()
        for (name, gbps), line in zip(roofs.items(), ("-", "--"), strict=False):
            bend = max(peaks.values(), default=gbps * right) / gbps
            ends = (left, max(left, min(right, bend)))
            roof = [gbps * end for end in ends]
            axes.plot(ends, roof, color="black", linestyle=line, label=f"{name}, {gbps:.3g} GB/s")
        for (dtype, peak), width in zip(sorted(peaks.items()), (1.0, 1.6, 2.2), strict=False):
            begin = max(left, peak / fastest)
            label = f"matmul {dtype}, {peak:.4g} GFLOP/s"
            axes.plot((begin, right), (peak, peak), color="black", linestyle="-.", linewidth=width, label=label)
        shown = set()
        for row, intensity, height in found:
            style, wide = STYLES[row.candidate], row.details.get("dtype") in ("float32", "float64")
            label = f"{row.candidate}, {row.details.get('dtype', '')}"
            face = "white" if wide else style.colour
            axes.plot(
                intensity, height, linestyle="none", marker=style.marker, color=style.colour,
                markerfacecolor=face, label=None if label in shown else label,
            )  # fmt: skip
            shown.add(label)
        axes.set(xscale="log", yscale="log", xlim=(left, right), xlabel="FLOPs a byte, counted from the least of both")
        axes.set_ylim(0.5 * min(heights), 2 * max([*heights, *peaks.values()]))
        axes.set_ylabel("GFLOP/s achieved")
        drawing.plain(axes)
        axes.legend(loc="lower right", fontsize=7.5, framealpha=0.9)
        return drawing.save(figure, record, f"{bench}, roofline; filled: 16 bits, hollow: wider", paths)
