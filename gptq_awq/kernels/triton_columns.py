"""The column sweep and the range search for GPUs: what columns.py compiles for CPUs, in Triton.

Rows of a weight matrix do not depend on each other in GPTQ. So each program owns a tile of rows, keeps it in
registers, and walks the columns of the block: one launch per block, where a loop of tensor operations needs about
ten per column. Importing this module takes Triton, which PyTorch's CUDA builds bring along; gpu.py says where it runs.

Arithmetic and its order are those of the plain loop in solvers/gptq.py. Triton's `/` is approximate and its compiler
fuses products into sums; here divisions are IEEE's, fusion is switched off and rounding is half to even, so that codes
and errors are the plain loop's bit for bit. The range search sums in another order than plain PyTorch and takes
powers by exp2 and log2, which a GPU approximates: of candidates whose errors agree to about 1e-6, either may win.
"""

# Triton's kernels are not Python to a type checker: launches take options that their signatures don't have.
# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false
import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from gptq_awq.kernels.columns import MINIMUM, TABLE

_MINIMUM, _TABLE = tl.constexpr(MINIMUM), tl.constexpr(TABLE)
# x + _SHIFT - _SHIFT rounds a float32 below 2^22 to the nearest integer, halves to even. Larger numbers stay above
# 2^22 or so, which every grid clips.
_SHIFT = tl.constexpr(1.5 * 2**23)
_MSE_NORM = tl.constexpr(2.4)


@triton.jit
def _nearest(x, s, z, max_code, levels, KIND: tl.constexpr, LEVELS: tl.constexpr):
    """Code and value of the grid's nearest neighbour of x: `Arithmetic.encode` and `decode`."""
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
    # Weights; of columns that were rounded, their errors.
    tile = tl.load(w + row * w_row + j * w_column, here & (j < block), 0.0)
    rounded = tl.zeros_like(tile)
    for i in range(first, first + count):
        x = tl.sum(tl.where(j == i, tile, 0.0), 1)
        s = tl.load(scale + r * scale_row + (i - first) * scale_column, real, 1.0)
        z = tl.load(zero + r * zero_row + (i - first) * zero_column, real, 0.0)
        code, q = _nearest(x, s, z, max_code, levels, KIND, LEVELS)
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
    """Round some neighbouring columns of one block, passing each error on to the block's later columns.

    All tensors are float32, on one device and of any strides, but that rows of `u` are contiguous. One launch; the
    host is not waited for.

    Args:
        w: the block's weights, those of one input in a stack; columns after those to round are changed in place.
        u: the block's diagonal part of each stack's upper factor.
        scale: of the columns to round.
        zero: likewise.
        max_code: the grid's arithmetic, as in columns.py.
        kind: likewise.
        levels: likewise; empty but for tables.
        first: first of these columns within the block.
        codes: those columns are written.
        errors: those columns are written: (w - q) / U_ii.
        tile: rows and warps of one program, see `row_tile`.
    """
    stacks, rows, block = w.shape
    width = triton.next_power_of_2(block)
    height, warps = tile or row_tile(width)
    with torch.cuda.device_of(w):
        _sweep[(triton.cdiv(rows, height), stacks)](
            *(w, u, scale, zero, levels, codes, errors),
            *(float(max_code), rows, block, first, scale.shape[2]),
            *(*w.stride(), *u.stride()[:2], *scale.stride(), *zero.stride(), *codes.stride(), *errors.stride()),
            *(kind, len(levels), height, width),
            num_warps=warps,
            enable_fp_fusion=False,
        )


def row_tile(width: int) -> tuple[int, int]:
    """Rows and warps of one program that holds `width` columns, a power of two.

    One warp holds 512 weights, sixteen to a thread: it needs neither barriers nor shared memory, and 4096 rows of 128
    columns make eight warps for each multiprocessor of a Hopper GPU.
    """
    return max(1, 512 // width), min(max(1, width // 512), 16)


@triton.jit
def _deltas(w, r, real, a, w_row, w_column, s, z, max_code, levels, columns,
            KIND: tl.constexpr, LEVELS: tl.constexpr, TILE: tl.constexpr):  # fmt: skip
    """ŵ - w of some columns, 0 beyond the last."""
    j = a + tl.arange(0, TILE)
    mask = real[:, None] & (j < columns)[None, :]
    x = tl.load(w + r[:, None] * w_row + j[None, :] * w_column, mask, 0.0)
    _, value = _nearest(x, s[:, None], z[:, None], max_code, levels, KIND, LEVELS)
    return tl.where(mask, value - x, 0.0)


@triton.jit
def _search(
    w, scale, zero, levels, hessian, best,
    max_code, rows, columns, candidates,
    w_row, w_group, w_column, scale_row, scale_group, hessian_group, hessian_row,
    HESSIAN: tl.constexpr, KIND: tl.constexpr, LEVELS: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
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
    """For each row of each group, which of its candidate ranges rounds with the least error; the first on a tie.

    The error is Δ H Δᵀ with the group's diagonal block H of the Hessian, or Σ |Δ|^2.4 where none is given. One launch
    for all candidates, rows and groups. A group's deltas are computed anew for each tile of H, not kept: fine for
    groups of some hundred columns; a product of whole matrices is faster for whole rows.

    Args:
        w: float32, of any strides.
        scale: float32.
        zero: float32.
        max_code: the grid's arithmetic, as above.
        kind: likewise.
        levels: likewise.
        hessian: float32.
        best: int64, contiguous, written.
    """
    rows, groups, columns = w.shape
    scale, zero = scale.contiguous(), zero.contiguous()
    h = w.new_empty(1, 1, 1) if hessian is None else hessian.contiguous()
    height, width = 32, min(max(triton.next_power_of_2(columns), 16), 64)
    with torch.cuda.device_of(w):
        _search[(triton.cdiv(rows, height), groups)](
            *(w, scale, zero, levels, h, best),
            *(float(max_code), rows, columns, scale.shape[2]),
            *(*w.stride(), *scale.stride()[:2], *h.stride()[:2]),
            *(hessian is not None, kind, len(levels), height, width),
            num_warps=4,
            enable_fp_fusion=False,
        )
