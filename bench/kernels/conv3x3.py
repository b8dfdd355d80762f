"""The heads' 3x3 convolutions one by one: ours on the CPU, the library's with our epilogue on a GPU, against the
library's alone, with a matmul of as many FLOPs as the ceiling. On a CPU with matrix tiles each kernel of ours by itself
too, and a layer of the student, whichever ftfast would take.
"""

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from rich.table import Table
from torch import Tensor

from bench import peers
from bench.harness import gate
from bench.harness.gate import Candidate, Group
from bench.harness.measuring import measure_groups
from bench.harness.records import Record, Row
from bench.harness.registry import Bench, Settings
from bench.kernels.layers import (
    FORWARD,
    INPUT_GRADIENT,
    SLOPE,
    STUDENT_LAYERS,
    WEIGHT_GRADIENT,
    WORKS,
    Layer,
    Operands,
    fastest_library,
    layers_of,
    library_steps,
    matmul_steps,
    operands,
)
from bench.results import tables
from bench.results.throughput import MATMUL, throughput_markdown, throughput_tables
from ftfast.dispatch import supports

STEM = "conv3x3"
OURS = "ftfast"
LIBRARY = "library"
LIBRARY_AND_EPILOGUE = "library, our epilogue"
TILES, DOT_PRODUCTS = "ftfast, tiles", "ftfast, dot products"
FORMULA = (
    "every work 2*9*N*H*W*C*K FLOPs and (N*H*W*(C+K) + 9*C*K)*e bytes, e bytes an element: both maps and the weight, "
    "each once; forward with bias and LeakyReLU"
)


def group_name(layer: Layer, dtype: torch.dtype) -> str:
    """The name of a table."""
    return f"{layer}, {str(dtype).removeprefix('torch.')}"


def why_not_ours(device: torch.device, dtype: torch.dtype) -> str:
    """Why there is no candidate of ours, or nothing."""
    backend = "native" if device.type == "cpu" else "triton"
    if not (support := supports(backend, device, dtype, dtype)).ok:
        return f"no kernel of ours here: {support.reason}"
    taken = (torch.float32, torch.bfloat16) if backend == "native" else (torch.float32, torch.bfloat16, torch.float16)
    return "" if dtype in taken else f"no kernel of ours here: {str(dtype).removeprefix('torch.')} is the library's"


def layers(settings: Settings) -> list[Layer]:
    """The convolutions to measure: on the CPU the student's too."""
    found = layers_of(settings.heads)
    if settings.device.type == "cpu":
        found += [layer for head in settings.heads for layer in STUDENT_LAYERS.get(head.name, ())]
    return found


def groups(settings: Settings) -> Iterator[Group]:
    """One group for each convolution and dtype."""
    for layer in layers(settings):
        for dtype in settings.head_dtypes:
            details: dict[str, Any] = {"dims": list(layer), "dtype": str(dtype).removeprefix("torch.")}
            if note := why_not_ours(settings.device, dtype):
                details["note"] = note
            yield Group(STEM, group_name(layer, dtype), details, _builder(settings, layer, dtype))


def _builder(settings: Settings, layer: Layer, dtype: torch.dtype) -> Callable[[], list[Candidate]]:
    return lambda: candidates(settings, layer, dtype)


def our_steps(with_: Operands) -> dict[str, Callable[[], Tensor]]:
    """What the CPU's head is made of; the weight is prepared off the clock, as the library's is cast."""
    from ftfast.ops.conv3x3 import native as conv3x3_native

    x, dz, parameter, _, bias = with_
    weight = conv3x3_native.prepare_weight(parameter, x.dtype)

    def gradient(wanted: int) -> Tensor:
        found = conv3x3_native.gradients(x, dz, parameter, need_input=wanted == 0, need_weight=wanted == 1)[wanted]
        assert found is not None
        return found

    return {
        FORWARD: lambda: conv3x3_native.forward(x, weight, bias, SLOPE),
        INPUT_GRADIENT: lambda: gradient(0),
        WEIGHT_GRADIENT: lambda: gradient(1),
    }


def kernels_to_choose(device: torch.device, dtype: torch.dtype, layer: Layer) -> tuple[str, ...]:
    """Our kernels for a convolution on a CPU with matrix tiles, of which ftfast has to know the fastest."""
    from ftfast.ops.conv3x3 import direct
    from ftfast.ops.conv3x3.native import CANDIDATES

    takes = dtype == torch.bfloat16 and direct.fits(layer.channels_in, layer.channels_out)
    return (TILES, DOT_PRODUCTS) if device.type == "cpu" and takes and direct.TILES in CANDIDATES else ()


def kernel_steps(with_: Operands, name: str) -> dict[str, Callable[[], Tensor]]:
    """One kernel of ours, as :func:`our_steps` has the one that ftfast takes."""
    from ftfast.ops.conv3x3 import direct
    from ftfast.ops.conv3x3 import native as conv3x3_native

    x, dz, parameter, _, bias = with_
    kernel, of_weight = (direct.TILES, direct.TILES) if name == TILES else (direct.DIRECT, "native")
    weight = direct.pack(parameter, kernel=kernel)

    def weight_gradient() -> Tensor:
        found = conv3x3_native.gradients(x, dz, parameter, need_input=False, kernel=of_weight)[1]
        assert found is not None
        return found

    return {
        FORWARD: lambda: direct.convolve(x, weight, bias.float(), negative_slope=SLOPE),
        INPUT_GRADIENT: lambda: direct.convolve(dz, direct.pack(parameter, for_gradient=True, kernel=kernel)),
        WEIGHT_GRADIENT: weight_gradient,
    }


def library_and_epilogue(with_: Operands) -> dict[str, Callable[[], Tensor]]:
    """What the GPU's head is made of: the library's convolution without bias, and ours after it in place."""
    from ftfast.kernels import activation

    bias = with_.bias.float()

    def forward() -> Tensor:
        y = F.conv2d(with_.x, with_.weight, padding=1)
        activation.bias_leaky_relu_(y.permute(0, 2, 3, 1), bias, SLOPE)
        return y

    return {FORWARD: forward}


def limits(dtype: torch.dtype, device: torch.device) -> tuple[float, float]:
    """The largest relative L2 error and error of the length: results are rounded once, sums are float32."""
    if dtype == torch.float64:
        return 1e-12, 1e-12
    if dtype.itemsize < 4:
        return torch.finfo(dtype).eps, 5e-4
    if device.type == "cuda" and torch.backends.cudnn.allow_tf32:
        return 2e-3, 9e-4
    return 2e-5, 1e-5


def candidates(settings: Settings, layer: Layer, dtype: torch.dtype) -> list[Candidate]:
    """What is compared on one convolution."""
    device = settings.device
    with_ = operands(layer, dtype, device, settings.plan.seed)
    error_limit, length_limit = limits(dtype, device)

    @cache
    def expected() -> dict[str, Tensor]:
        exact = library_steps(Operands(*(tensor.double() for tensor in with_)))
        return {work: step() for work, step in exact.items()}

    def candidate(name: str, work: str, step: Callable[[], Tensor]) -> Candidate:
        def judge() -> gate.Errors:
            errors = gate.relative_errors(work, step(), expected()[work])
            # Few elements do not average their rounding out.
            rounding = torch.finfo(dtype).eps / expected()[work].numel() ** 0.5
            return gate.within(errors, {work: error_limit, gate.length_of(work): length_limit + rounding})

        least_bytes = layer.elements * dtype.itemsize
        return Candidate(name, work, step, least_bytes=least_bytes, gate=judge, details={"flops": layer.flops})

    found = [candidate(LIBRARY, work, step) for work, step in library_steps(with_).items()]
    if not why_not_ours(device, dtype):
        name, steps = (OURS, our_steps) if device.type == "cpu" else (LIBRARY_AND_EPILOGUE, library_and_epilogue)
        found += [candidate(name, work, step) for work, step in steps(with_).items()]
    for name in kernels_to_choose(device, dtype, layer):
        found += [candidate(name, work, step) for work, step in kernel_steps(with_, name).items()]
    for work, step in matmul_steps(layer, dtype, device).items():
        found.append(Candidate(MATMUL, work, step, details={"flops": layer.flops}))
    destination = torch.empty_like(with_.x)
    found.append(Candidate(peers.COPY, peers.COPY, lambda: destination.copy_(with_.x), least_bytes=2 * with_.x.nbytes))
    return found


def size(settings: Settings) -> int:
    """How often :func:`run` reports progress."""
    total = 0
    for dtype in settings.head_dtypes:
        # The library's and the matmul of every work, the copy; ours of every work, or after the library's forward.
        ours = 0 if why_not_ours(settings.device, dtype) else len(WORKS) if settings.device.type == "cpu" else 1
        for layer in layers(settings):
            by_kernel = len(WORKS) * len(kernels_to_choose(settings.device, dtype, layer))
            total += 2 * len(WORKS) + 1 + ours + by_kernel
    return total * (1 + settings.plan.blocks)


def run(settings: Settings, advance: Callable[[str], None]) -> list[Row]:
    """Measure every group."""
    with fastest_library():
        return measure_groups(groups(settings), settings.device, settings.plan, advance)


def show(rows: list[Row]) -> Iterator[Table]:
    """One table for each convolution."""
    return throughput_tables(rows, {"over library": LIBRARY})


def markdown(newest: dict[str, tuple[str, Record]], brief: bool = False) -> str:
    """The block of the README and of docs/benchmarks.md."""

    def found_in(_: str, record: Record) -> tuple[str, list[str]]:
        rows = record.of(STEM)
        ours = LIBRARY_AND_EPILOGUE if "gpu" in record.hardware else OURS
        works = [work for work in WORKS if any(row.candidate == ours and row.work == work for row in rows)]
        if not works:
            return ". No kernel of ours here; the library's convolutions are the only candidate", []
        return "", [
            throughput_markdown(rows, work, [LIBRARY, ours, MATMUL], ours, [LIBRARY], f"{work} of convolution, dtype")
            for work in works
        ]

    return tables.by_device(newest, found_in, brief)


BENCH = Bench(
    summary="the heads' 3x3 convolutions and both of their gradients against the library's and a matmul of their FLOPs",
    size=size,
    run=run,
    tables=show,
    markdown=markdown,
    formula=FORMULA,
)
