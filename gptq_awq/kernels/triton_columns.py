"""GPTQ's column sweep (arXiv 2210.17323) and the search for clipping ranges in Triton, for GPUs; CPUs: columns.py.

Rows of a weight matrix do not depend on each other in GPTQ. So each program owns a tile of rows, keeps it in
registers, and walks the columns of the block: one launch per block, where a loop of tensor operations needs about
ten per column. Importing this module needs Triton, which PyTorch's CUDA builds bring along; gpu.py says where it runs.

Arithmetic and its order are those of the plain loop in solvers/gptq.py. Triton's `/` is approximate and its compiler
fuses products into sums; here divisions are IEEE's, fusion is switched off and rounding is half to even, so that codes
and errors equal the plain loop's bit for bit. The range search sums in another order than plain PyTorch and takes
powers by exp2 and log2, which a GPU approximates: of candidates whose errors agree to about 1e-6, either may win.
"""

# Triton's kernels are not Python to a type checker: launches take options that their signatures don't have.
# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false
import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from gptq_awq.kernels.columns import FLOAT, MINIMUM, TABLE

_MINIMUM, _TABLE, _FLOAT = tl.constexpr(MINIMUM), tl.constexpr(TABLE), tl.constexpr(FLOAT)
_EXPONENT_BITS = tl.constexpr(0x7F800000)
"""Bits of a float32's exponent: by themselves, the power of two at or below a number."""
# x + _SHIFT - _SHIFT rounds a float32 below 2^22 to the nearest integer, halves to even. Larger numbers stay above
# 2^22 or so, which every grid clips.
_SHIFT = tl.constexpr(1.5 * 2**23)
_MSE_NORM = tl.constexpr(2.4)


@triton.jit
def _nearest_float(units, s, max_code, levels):
    """Codes and values of the nearest numbers of a small floating-point type, halves to even."""
    mantissa, least = tl.load(levels).to(tl.int32), tl.load(levels + 1).to(tl.int32)
    smallest = ((least + 127) << 23).to(tl.float32, bitcast=True)  # normal number
    step = ((127 - mantissa) << 23).to(tl.float32, bitcast=True)
    a = tl.minimum(tl.abs(units), tl.load(levels + 2))
    power = (a.to(tl.int32, bitcast=True) & _EXPONENT_BITS).to(tl.float32, bitcast=True)
    quantum = tl.maximum(power, smallest) * step
    v = (tl.div_rn(a, quantum) + _SHIFT - _SHIFT) * quantum
    normal = ((v.to(tl.int32, bitcast=True) >> (23 - mantissa)) - ((least + 126) << mantissa)).to(tl.float32)
    code = tl.where(v >= smallest, normal, tl.div_rn(v, tl.zeros_like(v) + smallest * step))
    below = (units < 0) & (code > 0)
    return tl.where(below, code + (max_code + 1) / 2, code), s * tl.where(below, -v, v)


@triton.jit
def nearest(x, s, z, max_code, levels, KIND: tl.constexpr, LEVELS: tl.constexpr):
    """Round x to the grid: code and value of the nearest neighbour, as `Arithmetic.encode` and `decode` do."""
    if KIND == _MINIMUM:
        x = x - z
    units = tl.where(s == 0, 0.0, tl.div_rn(x, tl.where(s == 0, 1.0, s)))
    if KIND == _TABLE:
        code = tl.zeros_like(units)
        level = tl.zeros_like(units)
        least = tl.zeros_like(units) + float("inf")
        for c in tl.static_range(LEVELS):
            candidate = tl.load(levels + c)
            distance = tl.abs(units - candidate)
            code = tl.where(distance < least, c * 1.0, code)
            level = tl.where(distance < least, candidate, level)
            least = tl.minimum(distance, least)
        value = s * level
    elif KIND == _FLOAT:
        code, value = _nearest_float(units, s, max_code, levels)
    else:
        code = (units + _SHIFT) - _SHIFT
        if KIND == _MINIMUM:
            code = tl.minimum(tl.maximum(code, 0.0), max_code)
            value = s * code + z
        else:
            code = tl.minimum(tl.maximum(code + z, 0.0), max_code)
            value = s * (code - z)
    return code, value


@triton.jit
def _sweep(
    w, u, scale, zero, levels, codes, errors,
    max_code, rows, block, first, count,
    w_stack, w_row, w_column, u_stack, u_row,
    scale_stack, scale_row, scale_column, zero_stack, zero_row, zero_column,
    codes_stack, codes_row, codes_column, errors_stack, errors_row, errors_column,
    KIND: tl.constexpr, LEVELS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sweep some columns of one tile of ROWS rows of one stack; axis 0 of the grid: tiles, axis 1: stacks."""
    stack = tl.program_id(1).to(tl.int64)
    w += stack * w_stack
    u += stack * u_stack
    scale += stack * scale_stack
    zero += stack * zero_stack
    codes += stack * codes_stack
    errors += stack * errors_stack
    r = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    j = tl.arange(0, BLOCK)[None, :]
    real, row = r < rows, r[:, None]
    here = real[:, None]
    # Holds weights and, in columns that are rounded already, errors.
    tile = tl.load(w + row * w_row + j * w_column, here & (j < block), 0.0)
    rounded = tl.zeros_like(tile)
    for i in range(first, first + count):
        x = tl.sum(tl.where(j == i, tile, 0.0), 1)
        s = tl.load(scale + r * scale_row + (i - first) * scale_column, real, 1.0)
        z = tl.load(zero + r * zero_row + (i - first) * zero_column, real, 0.0)
        code, q = nearest(x, s, z, max_code, levels, KIND, LEVELS)
        e = tl.div_rn(x - q, tl.zeros_like(x) + tl.load(u + i * u_row + i))[:, None]
        later = tl.load(u + i * u_row + j, (j > i) & (j < block), 0.0)
        tile = tl.where(j == i, e, tile - e * later)
        rounded = tl.where(j == i, code[:, None], rounded)
    done = here & (j >= first) & (j < first + count)
    tl.store(codes + row * codes_row + j * codes_column, rounded, done)
    tl.store(errors + row * errors_row + j * errors_column, tile, done)
    tl.store(w + row * w_row + j * w_column, tile, here & (j >= first + count) & (j < block))


def sweep_columns(
    w: Float[Tensor, "stacks rows block"],
    u: Float[Tensor, "stacks block block"],
    scale: Float[Tensor, "stacks rows count"],
    zero: Float[Tensor, "stacks rows count"],
    max_code: float,
    kind: int,
    levels: Float[Tensor, "n"],
    first: int,
    codes: Float[Tensor, "stacks rows block"],
    errors: Float[Tensor, "stacks rows block"],
    tile: tuple[int, int] | None = None,
) -> None:
    """Round consecutive columns of one GPTQ block, propagating each column's error to the block's later columns.

    All tensors are float32, on one device and of any strides, except that rows of `u` are contiguous. It is one
    launch, asynchronous to the host.

    Args:
        w: the block's weights; linears that share an input share a stack. Columns after the rounded ones are changed
            in place.
        u: the block's diagonal part of each stack's upper Cholesky factor U.
        scale: scales of the columns to round.
        zero: zeros of the columns to round.
        max_code: largest code of the grid.
        kind: number of the grid's arithmetic, as in columns.py.
        levels: the grid's levels; empty except for tables and floats.
        first: index of the first column to round within the block.
        codes: written in the rounded columns.
        errors: written in the rounded columns: (w - q) / U_ii.
        tile: rows and warps of one program; None: those of `row_tile`.
    """
    stacks, rows, block = w.shape
    width = triton.next_power_of_2(block)
    height, warps = tile or row_tile(width)
    with torch.cuda.device_of(w):
        _sweep[(triton.cdiv(rows, height), stacks)](
            w=w,
            u=u,
            scale=scale,
            zero=zero,
            levels=levels,
            codes=codes,
            errors=errors,
            max_code=float(max_code),
            rows=rows,
            block=block,
            first=first,
            count=scale.shape[2],
            **_strides("stack row column", w=w, scale=scale, zero=zero, codes=codes, errors=errors),
            **_strides("stack row", u=u),
            KIND=kind,
            LEVELS=len(levels),
            ROWS=height,
            BLOCK=width,
            num_warps=warps,
            enable_fp_fusion=False,
        )


def _strides(axes: str, **tensors: Tensor) -> dict[str, int]:
    """Strides of the tensors' first axes as arguments NAME_AXIS of a kernel."""
    return {f"{name}_{axis}": x.stride(i) for name, x in tensors.items() for i, axis in enumerate(axes.split())}


def row_tile(width: int) -> tuple[int, int]:
    """Number of rows and warps of one program that holds `width` columns, a power of two.

    One warp holds 512 weights, sixteen to a thread: it needs neither barriers nor shared memory, and 4096 rows of 128
    columns make eight warps for each multiprocessor of a Hopper GPU.
    """
    return max(1, 512 // width), min(max(1, width // 512), 16)


@triton.jit
def _deltas(w, r, real, a, w_row, w_column, s, z, max_code, levels, columns,
            KIND: tl.constexpr, LEVELS: tl.constexpr, TILE: tl.constexpr):  # fmt: skip
    """Rounding errors ŵ - w of TILE columns from column `a` on; 0 beyond the last."""
    j = a + tl.arange(0, TILE)
    mask = real[:, None] & (j < columns)[None, :]
    x = tl.load(w + r[:, None] * w_row + j[None, :] * w_column, mask, 0.0)
    _, value = nearest(x, s[:, None], z[:, None], max_code, levels, KIND, LEVELS)
    return tl.where(mask, value - x, 0.0)


@triton.jit
def _search(
    w, scale, zero, levels, hessian, best,
    max_code, rows, columns, candidates,
    w_row, w_group, w_column, scale_row, scale_group, hessian_group, hessian_row,
    HESSIAN: tl.constexpr, KIND: tl.constexpr, LEVELS: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Find the best range for each of a tile's ROWS rows in one group; axis 0 of the grid: tiles, axis 1: groups."""
    group = tl.program_id(1).to(tl.int64)
    r = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    real = r < rows
    w += group * w_group
    hessian += group * hessian_group
    params = group * scale_group + r * scale_row
    chosen = tl.zeros([ROWS], tl.int64)
    least = tl.zeros([ROWS], tl.float32) + float("inf")
    for c in range(candidates):
        s, z = tl.load(scale + params + c, real, 1.0), tl.load(zero + params + c, real, 0.0)
        error = tl.zeros([ROWS], tl.float32)
        for b in range(0, columns, TILE):
            delta = _deltas(w, r, real, b, w_row, w_column, s, z, max_code, levels, columns, KIND, LEVELS, TILE)
            if HESSIAN:
                k = b + tl.arange(0, TILE)
                product = tl.zeros([ROWS, TILE], tl.float32)
                for a in range(0, columns, TILE):
                    i = a + tl.arange(0, TILE)
                    inside = (i < columns)[:, None] & (k < columns)[None, :]
                    h = tl.load(hessian + i[:, None].to(tl.int64) * hessian_row + k[None, :], inside, 0.0)
                    d = _deltas(w, r, real, a, w_row, w_column, s, z, max_code, levels, columns, KIND, LEVELS, TILE)
                    product = tl.dot(d, h, product, input_precision="ieee")
                error += tl.sum(product * delta, 1)
            else:
                size = tl.abs(delta)
                power = tl.exp2(tl.log2(tl.where(size == 0, 1.0, size)) * _MSE_NORM)
                error += tl.sum(tl.where(size == 0, 0.0, power), 1)
        chosen = tl.where(error < least, c, chosen)
        least = tl.minimum(error, least)
    tl.store(best + r * tl.num_programs(1) + group, chosen, real)


def best_range(
    w: Float[Tensor, "rows groups cols"],
    scale: Float[Tensor, "rows groups candidates"],
    zero: Float[Tensor, "rows groups candidates"],
    max_code: float,
    kind: int,
    levels: Float[Tensor, "n"],
    hessian: Float[Tensor, "groups cols cols"] | None,
    best: Int[Tensor, "rows groups"],
) -> None:
    """For each row and group, find the candidate range that rounds with the least error; the first on a tie.

    The error is Δ H Δᵀ with the group's diagonal block H of the Hessian, or Σ |Δ|^2.4 where none is given. It is one
    launch for all candidates, rows and groups. A group's Δ is recomputed for each tile of H, not stored: fine for
    groups of some hundred columns; a product of whole matrices is faster for whole rows.

    Args:
        w: float32 weights, of any strides.
        scale: float32 scales of the candidates.
        zero: float32 zeros of the candidates.
        max_code: largest code of the grid.
        kind: number of the grid's arithmetic, as in columns.py.
        levels: the grid's levels; empty except for tables and floats.
        hessian: float32; None: minimize Σ |Δ|^2.4.
        best: int64, contiguous, written: index of the best candidate.
    """
    rows, groups, columns = w.shape
    scale, zero = scale.contiguous(), zero.contiguous()
    h = w.new_empty(1, 1, 1) if hessian is None else hessian.contiguous()
    height, width = 32, min(max(triton.next_power_of_2(columns), 16), 64)
    with torch.cuda.device_of(w):
        _search[(triton.cdiv(rows, height), groups)](
            w=w,
            scale=scale,
            zero=zero,
            levels=levels,
            hessian=h,
            best=best,
            max_code=float(max_code),
            rows=rows,
            columns=columns,
            candidates=scale.shape[2],
            **_strides("row group column", w=w),
            **_strides("row group", scale=scale),
            **_strides("group row", hessian=h),
            HESSIAN=hessian is not None,
            KIND=kind,
            LEVELS=len(levels),
            ROWS=height,
            TILE=width,
            num_warps=4,
            enable_fp_fusion=False,
        )
