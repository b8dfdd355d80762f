"""The rates that bound everything else: torch.matmul, a plain matmul in Triton, and a copy."""

# mypy: disallow-incomplete-defs=False
# (a kernel's parameters carry Triton's annotations, and only where Triton needs one)

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from bench.on_gpu.findings import Findings, Stopwatch, device_here, try_each
from ftfast.kernels.device import device_guard
from ftfast.kernels.launch import INTERPRETED

# rows, inner, columns: a large one, and the heads' convolutions written as matmuls.
SIZES = [(8192, 8192, 8192), (12544, 4608, 512), (12544, 4608, 256), (12544, 2304, 256)]
# BM, BN, BK, warps, stages
TILES = [(128, 256, 64, 8, 3), (128, 256, 64, 8, 4), (128, 128, 64, 8, 3), (128, 128, 64, 4, 4), (64, 256, 64, 4, 4)]
GROUPED_ROWS = 8


@triton.jit(do_not_specialize=["rows", "inner", "columns"])
def _matmul_kernel(
    left,  # descriptor of [rows, inner]
    right,  # descriptor of [inner, columns]
    out,  # descriptor of [rows, columns]
    rows,
    inner,
    columns,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUPED: tl.constexpr,
):
    # Programs that follow each other share rows or columns, so that both operands stay in L2.
    program = tl.program_id(0)
    tiles_m = tl.cdiv(rows, BM)
    tiles_n = tl.cdiv(columns, BN)
    of_group = GROUPED * tiles_n
    first_m = (program // of_group) * GROUPED
    height = tl.minimum(tiles_m - first_m, GROUPED)
    row = (first_m + (program % of_group) % height) * BM
    column = ((program % of_group) // height) * BN
    accumulator = tl.zeros((BM, BN), tl.float32)
    for k in range(tl.cdiv(inner, BK)):
        x = left.load([row, k * BK])
        y = right.load([k * BK, column])
        if INTERPRETED:
            accumulator = tl.dot(x.to(tl.float32), y.to(tl.float32), accumulator)
        else:
            accumulator = tl.dot(x, y, accumulator)
    out.store([row, column], accumulator.to(out.dtype))


def triton_matmul(left: Tensor, right: Tensor, out: Tensor, tile: tuple[int, int, int, int, int]) -> None:
    """``out = left @ right`` for 16-bit operands, contiguous and with rows of a multiple of 16 bytes."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    block_m, block_n, block_k, warps, stages = tile
    (rows, inner), columns = left.shape, right.shape[1]
    with device_guard(left.device):
        _matmul_kernel[(triton.cdiv(rows, block_m) * triton.cdiv(columns, block_n),)](
            TensorDescriptor.from_tensor(left, [block_m, block_k]),
            TensorDescriptor.from_tensor(right, [block_k, block_n]),
            TensorDescriptor.from_tensor(out, [block_m, block_n]),
            rows,
            inner,
            columns,
            BM=block_m,
            BN=block_n,
            BK=block_k,
            GROUPED=GROUPED_ROWS,
            num_warps=warps,
            num_stages=stages,
            enable_fp_fusion=True,
        )


def cases(
    sizes: list[tuple[int, int, int]], tiles: list[tuple[int, int, int, int, int]], copied: int, calls: int
) -> dict[str, Callable[[], dict[str, Any]]]:
    """One for each size by torch and by each tile, and the copy of ``copied`` bytes."""
    device = device_here()
    stopwatch = Stopwatch(device, calls)

    def rate(step: Callable[[], object], size: tuple[int, int, int]) -> dict[str, Any]:
        ms = stopwatch.median(step)
        rows, inner, columns = size
        tflops = 2 * rows * inner * columns / (ms * 1e9)
        return {"device": device.type, "ms": round(ms, 5), "tflops": round(tflops, 2)}

    def operands(size: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
        rows, inner, columns = size
        # Random numbers: zeros draw less power and run faster.
        left, right = (torch.randn(shape, device=device) for shape in ((rows, inner), (inner, columns)))
        return left.to(torch.bfloat16), right.to(torch.bfloat16)

    def by_torch(size: tuple[int, int, int]) -> dict[str, Any]:
        left, right = operands(size)
        return rate(lambda: left @ right, size)

    def by_triton(size: tuple[int, int, int], tile: tuple[int, int, int, int, int]) -> dict[str, Any]:
        left, right = operands(size)
        out = torch.full((size[0], size[2]), float("nan"), dtype=torch.bfloat16, device=device)
        triton_matmul(left, right, out, tile)
        expected = left.float() @ right.float()
        error = ((out.float() - expected).norm() / expected.norm()).item()
        if not error < 1e-2:
            raise RuntimeError(f"it is off by {error:.1e}")
        return rate(lambda: triton_matmul(left, right, out, tile), size)

    def copy() -> dict[str, Any]:
        source = torch.randint(0, 255, (copied,), dtype=torch.uint8, device=device)
        destination = torch.empty_like(source)
        ms = stopwatch.median(lambda: destination.copy_(source))
        return {"device": device.type, "ms": round(ms, 5), "gbps": round(2 * copied / (ms * 1e6), 1)}

    found: dict[str, Callable[[], dict[str, Any]]] = {"copy": copy}
    for size in sizes:
        name = "x".join(map(str, size))
        found[f"torch {name}"] = lambda size=size: by_torch(size)  # type: ignore[misc]
        for tile in tiles:
            found[f"triton {name} tile {tile}"] = lambda size=size, tile=tile: by_triton(size, tile)  # type: ignore[misc]
    return found


def main() -> int:
    """Returns how many cases raised, at most 100."""
    parser = argparse.ArgumentParser(prog="python -m bench.on_gpu.matmuls", description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--small", action="store_true", help="one tiny size")
    options = parser.parse_args()
    if options.small:
        measured = cases([(24, 40, 24)], [(16, 16, 16, 1, 2)], 2**12, 1)
    else:
        measured = cases(SIZES, TILES, 2**30, 30)
    return min(try_each(Findings(options.out), measured), 100)


if __name__ == "__main__":
    sys.exit(main())
