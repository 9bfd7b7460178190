"""Coordinate descent over the codes of a group of columns (solvers/refine.py) in Triton, for GPUs; CPUs: descent.py.

As in the column sweep (triton_columns.py), each program owns a tile of rows and keeps it in registers while it walks
the columns: one launch per group, where plain tensor operations need ten per column.
"""

# Triton's kernels are not Python to a type checker: launches take options that their signatures don't have.
# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false
import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from gptq_awq.kernels.triton_columns import nearest, row_tile


@triton.jit
def _descend(
    value, slope, h, scale, zero, levels, codes, max_code, rows, columns, passes,
    value_row, slope_row, h_row, codes_row,
    KIND: tl.constexpr, LEVELS: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Descend over all columns of one tile of ROWS rows."""
    r = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    j = tl.arange(0, WIDTH)[None, :]
    real, row = r < rows, r[:, None]
    here = real[:, None] & (j < columns)
    v = tl.load(value + row * value_row + j, here, 0.0)
    g = tl.load(slope + row * slope_row + j, here, 0.0)
    s, z = tl.load(scale + r, real, 1.0), tl.load(zero + r, real, 0.0)
    chosen = tl.zeros_like(v)
    for _ in range(passes):
        for i in range(columns):
            x = tl.sum(tl.where(j == i, v, 0.0), 1)
            d = tl.zeros_like(x) + tl.load(h + i * h_row + i)
            wanted = x - tl.div_rn(tl.sum(tl.where(j == i, g, 0.0), 1), d)
            code, new = nearest(wanted, s, z, max_code, levels, KIND, LEVELS)
            g += (new - x)[:, None] * tl.load(h + i * h_row + j, j < columns, 0.0)
            v = tl.where(j == i, new[:, None], v)
            chosen = tl.where(j == i, code[:, None], chosen)
    tl.store(value + row * value_row + j, v, here)
    tl.store(slope + row * slope_row + j, g, here)
    tl.store(codes + row * codes_row + j, chosen, here)


def descend(
    value: Float[Tensor, "rows cols"],
    slope: Float[Tensor, "rows cols"],
    h: Float[Tensor, "cols cols"],
    scale: Float[Tensor, "rows"],
    zero: Float[Tensor, "rows"],
    max_code: float,
    kind: int,
    levels: Float[Tensor, "n"],
    passes: int,
    codes: Float[Tensor, "rows cols"],
) -> None:
    """Round every column of a group anew, `passes` times, to where it makes up best for all other columns.

    All tensors are float32, on one device, and their rows are contiguous. It is one launch.

    Args:
        value: dequantized weights, changed in place.
        slope: E H, half the derivative of the error by each weight, changed in place.
        h: the group's diagonal block of H.
        scale: scales of the group.
        zero: zeros of the group.
        max_code: largest code of the grid.
        kind: number of the grid's arithmetic, as in columns.py.
        levels: the grid's levels; empty except for tables and floats.
        passes: times that all columns are taken.
        codes: written.
    """
    rows, columns = value.shape
    width = triton.next_power_of_2(columns)
    height, warps = row_tile(width)
    with torch.cuda.device_of(value):
        _descend[(triton.cdiv(rows, height),)](
            value=value,
            slope=slope,
            h=h,
            scale=scale,
            zero=zero,
            levels=levels,
            codes=codes,
            max_code=float(max_code),
            rows=rows,
            columns=columns,
            passes=passes,
            value_row=value.stride(0),
            slope_row=slope.stride(0),
            h_row=h.stride(0),
            codes_row=codes.stride(0),
            KIND=kind,
            LEVELS=len(levels),
            ROWS=height,
            WIDTH=width,
            num_warps=warps,
            enable_fp_fusion=False,
        )
