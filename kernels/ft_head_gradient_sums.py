"""The Triton kernel that ends a head's backward: it adds up what the layers' programs left, in one launch.

Every weight's and bias's gradient is a sum of partial ones in a fixed order, so it is bit-equal from run to run.
"""

# mypy: disallow-incomplete-defs=False
# (a kernel's parameters carry Triton's annotations, and only where Triton needs one)

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import device_guard

# A program's outputs and inputs (all taps of them), or its columns of a bias's gradient and the rows it reads at once.
SUM_OUTPUTS = 32
SUM_INPUTS = 8
SUM_ROWS = 64
SUM_COLUMNS = 32
SUM_WARPS = 4


@triton.jit
def _sum_layer(
    partials,
    column_sums,
    dw,
    db,
    factor,
    program,
    splits,
    rows,
    channels,
    columns,
    OUTPUTS: tl.constexpr,
    INPUTS: tl.constexpr,
    ROWS: tl.constexpr,
    BIAS_COLUMNS: tl.constexpr,
):
    """``dw [columns, channels, 9] = factor * sum of partials [splits, 9, channels, columns]``, and db alike."""
    tiles_across = tl.cdiv(columns, OUTPUTS)
    tiles = tiles_across * tl.cdiv(channels, INPUTS)
    if program < tiles:
        k = (program % tiles_across) * OUTPUTS + tl.arange(0, OUTPUTS)[:, None, None]
        c = (program // tiles_across) * INPUTS + tl.arange(0, INPUTS)[None, :, None]
        tap = tl.arange(0, 16)[None, None, :]
        mask = (k < columns) & (c < channels) & (tap < 9)
        source = partials + (tap.to(tl.int64) * channels + c) * columns + k
        total = tl.zeros((OUTPUTS, INPUTS, 16), tl.float32)
        for _ in range(splits):
            total += tl.load(source, mask=mask, other=0.0)
            source += (9 * channels).to(tl.int64) * columns
        tl.store(dw + (k.to(tl.int64) * channels + c) * 9 + tap, total * factor, mask=mask)
    else:
        lane = tl.arange(0, ROWS)
        column = (program - tiles) * BIAS_COLUMNS + tl.arange(0, BIAS_COLUMNS)
        rows_source = column_sums + lane[:, None] * columns + column[None, :]
        sums = tl.zeros((ROWS, BIAS_COLUMNS), tl.float32)
        for row in range(0, rows, ROWS):
            mask = (row + lane < rows)[:, None] & (column < columns)[None, :]
            sums += tl.load(rows_source, mask=mask, other=0.0)
            rows_source += ROWS * columns
        tl.store(db + column, tl.sum(sums, 0) * factor, mask=column < columns)


_SUM_NUMBERS = [
    f"{what}{layer}" for layer in range(3) for what in ("programs", "splits", "rows", "channels", "columns")
]


_OF_A_LAYER = ("programs", "splits", "rows", "channels", "columns")


@triton.jit(do_not_specialize=[f"{what}{layer}" for layer in range(3) for what in _OF_A_LAYER])
def _sum_gradients_kernel(
    scale,
    partials0,
    column_sums0,
    dw0,
    db0,
    partials1,
    column_sums1,
    dw1,
    db1,
    partials2,
    column_sums2,
    dw2,
    db2,
    programs0,
    splits0,
    rows0,
    channels0,
    columns0,
    programs1,
    splits1,
    rows1,
    channels1,
    columns1,
    programs2,
    splits2,
    rows2,
    channels2,
    columns2,
    OUTPUTS: tl.constexpr,
    INPUTS: tl.constexpr,
    ROWS: tl.constexpr,
    BIAS_COLUMNS: tl.constexpr,
):
    """Three layers' :func:`_sum_layer`, ``programs`` of them each."""
    program = tl.program_id(0)
    factor = tl.load(scale)
    if program < programs0:
        _sum_layer(
            partials0,
            column_sums0,
            dw0,
            db0,
            factor,
            program,
            splits0,
            rows0,
            channels0,
            columns0,
            OUTPUTS,
            INPUTS,
            ROWS,
            BIAS_COLUMNS,
        )
    elif program < programs0 + programs1:
        _sum_layer(
            partials1,
            column_sums1,
            dw1,
            db1,
            factor,
            program - programs0,
            splits1,
            rows1,
            channels1,
            columns1,
            OUTPUTS,
            INPUTS,
            ROWS,
            BIAS_COLUMNS,
        )
    else:
        _sum_layer(
            partials2,
            column_sums2,
            dw2,
            db2,
            factor,
            program - programs0 - programs1,
            splits2,
            rows2,
            channels2,
            columns2,
            OUTPUTS,
            INPUTS,
            ROWS,
            BIAS_COLUMNS,
        )


def sum_gradients(
    partials: list[Tensor], column_sums: list[Tensor], scale: Tensor
) -> tuple[list[Tensor], list[Tensor]]:
    """The weight and bias gradients of three layers, in one launch.

    Args:
        partials: for each layer the float32 pieces of its weight's gradient, ``[splits, 9, C, K]`` contiguous.
        column_sums: for each layer the float32 pieces of its bias's gradient, ``[rows, K]`` contiguous.
        scale: 0-d float32 on the same device, multiplies all sums.

    Returns:
        ``[K, C, 3, 3]`` contiguous and ``[K]`` for each layer, float32.
    """
    dws, dbs = [], []
    pointers: list[Tensor] = []
    numbers: list[int] = []
    programs = 0
    for pieces, sums in zip(partials, column_sums, strict=True):
        splits, _, channels, columns = pieces.shape
        dws.append(torch.empty((columns, channels, 3, 3), dtype=torch.float32, device=pieces.device))
        dbs.append(torch.empty((columns,), dtype=torch.float32, device=pieces.device))
        here = triton.cdiv(columns, SUM_OUTPUTS) * triton.cdiv(channels, SUM_INPUTS) + triton.cdiv(columns, SUM_COLUMNS)
        pointers += [pieces, sums, dws[-1], dbs[-1]]
        numbers += [here, splits, sums.shape[0], channels, columns]
        programs += here
    with device_guard(scale.device):
        _sum_gradients_kernel[(programs,)](
            scale,
            *pointers,
            *numbers,
            OUTPUTS=SUM_OUTPUTS,
            INPUTS=SUM_INPUTS,
            ROWS=SUM_ROWS,
            BIAS_COLUMNS=SUM_COLUMNS,
            num_warps=SUM_WARPS,
            enable_fp_fusion=False,
        )
    return dws, dbs
