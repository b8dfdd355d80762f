"""The library's convolutions one by one: forward, input gradient, weight gradient of the heads' layers."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bench.kernels.layers import Layer, fastest_library, layers_of, library_steps, matmul_steps, operands
from bench.on_gpu.findings import Findings, Stopwatch, device_here, try_each
from bench.shapes import HEADS, HeadShape, parse_head

# The six shapes: the layers of a small and of a large head.
MEASURED = ("cifar-r56-r20", "imagenet-r34-r18")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def cases(
    heads: list[HeadShape], dtypes: tuple[torch.dtype, ...], calls: int
) -> dict[str, Callable[[], dict[str, Any]]]:
    """One for each dtype and layer."""
    device = device_here()
    stopwatch = Stopwatch(device, calls)

    def case(layer: Layer, dtype: torch.dtype) -> dict[str, Any]:
        library = library_steps(operands(layer, dtype, device, 0))
        matmuls = matmul_steps(layer, dtype, device)
        found: dict[str, Any] = {"device": device.type, "gflop": layer.flops / 1e9}
        for work, step in library.items():
            for name, timed in (("library", step), ("matmul", matmuls[work])):
                ms = stopwatch.median(timed)
                found[f"{name} {work}"] = {"ms": round(ms, 5), "tflops": round(layer.flops / (ms * 1e9), 2)}
        return found

    def named(layer: Layer, dtype: torch.dtype) -> tuple[str, Callable[[], dict[str, Any]]]:
        return f"{layer}, {str(dtype).removeprefix('torch.')}", lambda: case(layer, dtype)

    return dict(named(layer, dtype) for dtype in dtypes for layer in layers_of(heads))


def main() -> int:
    """Returns how many cases raised, at most 100."""
    parser = argparse.ArgumentParser(prog="python -m bench.on_gpu.convolutions", description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--small", action="store_true", help="one tiny layer")
    options = parser.parse_args()
    if options.small:
        measured = cases([parse_head("2x4:4x2x2")], (torch.bfloat16,), 2)
    else:
        measured = cases([HEADS[name] for name in MEASURED], DTYPES, 50)
    with fastest_library():
        return min(try_each(Findings(options.out), measured), 100)


if __name__ == "__main__":
    sys.exit(main())
