"""GPTQ's column sweep (arXiv 2210.17323) and the search for clipping ranges, compiled for the CPU.

Rows of a weight matrix do not depend on each other in GPTQ, so each thread takes `LANES` rows at a time, side by
side in vector registers, and runs the whole column recursion on data that stays in cache. Arithmetic and its order
are those of the plain PyTorch loop in solvers/gptq.py: the two agree bit for bit (tests/solvers/test_gptq.py).
"""

import numba
import numpy as np

from gptq_awq.kernels.compiled import compiled

AFFINE, MINIMUM, TABLE, FLOAT = range(4)  # as in grids/arithmetic.py
BITS_OF_ONE = 0x3F800000
"""Bits of the float32 1.0: in its exponent field, 0 stands for 2⁰."""
LANES = 64
"""Rows side by side. With fewer, LLVM unrolls the inner loops before it has vectorized them: four times as slow."""
AT_ONCE = 4
"""Columns whose errors are subtracted from a later one at once: it is read and written once for all of them."""
ROOM = 2
"""Rows of LANES numbers that `nearest` works in, allocated by its caller: that takes as long as rounding does."""


@numba.njit(inline="always")
def nearest(x, i, s, z, max_code, kind, levels, code, value, room):  # pragma: no cover (compiled)
    """Round row i of x to the grid: codes and values of the nearest neighbours, as `Arithmetic` encodes and decodes.

    Args:
        x: (rows, LANES) float32: numbers.
        i: the row of x that is rounded.
        s, z: (LANES,) float32: scales and zeros of that row's numbers.
        max_code, kind, levels: the grid's arithmetic; levels (n,) float32, empty except for tables and floats.
        code, value: (LANES,) float32, written.
        room: (ROOM, LANES) int32, overwritten.
    """
    zero = np.float32(0.0)
    if kind == AFFINE:
        for r in range(LANES):
            units = x[i, r] / s[r] if s[r] != zero else zero
            c = min(max(np.rint(units) + z[r], zero), max_code)
            code[r] = c
            value[r] = s[r] * (c - z[r])
    elif kind == MINIMUM:
        for r in range(LANES):
            units = (x[i, r] - z[r]) / s[r] if s[r] != zero else zero
            c = min(max(np.rint(units), zero), max_code)
            code[r] = c
            value[r] = s[r] * c + z[r]
    elif kind == FLOAT:
        nearest_float(x, i, s, max_code, levels, code, value)
    else:
        nearest_level(x, i, s, levels, code, value, room)


@numba.njit(inline="always")
def nearest_level(x, i, s, levels, code, value, room):  # pragma: no cover (compiled)
    """Round row i of x to multiples s of a table's levels, the first on a tie; arguments as in `nearest`.

    Distances are compared, and codes chosen, as bits: floats that aren't negative have their bits' order, and LLVM
    puts a choice by a comparison of floats, `code[r] = c if closer else code[r]`, into no vector registers.
    """
    zero = np.float32(0.0)
    for r in range(LANES):
        room[0, r], room[1, r] = np.int32(2**31 - 1), np.int32(0)
        value[r] = x[i, r] / s[r] if s[r] != zero else zero
    for c in range(len(levels)):
        level = levels[c]
        for r in range(LANES):
            distance = np.float32(abs(value[r] - level)).view(np.int32)
            closer = (distance - room[0, r]) >> np.int32(31)
            room[1, r] += closer & (np.int32(c) - room[1, r])
            room[0, r] = min(room[0, r], distance)
    for r in range(LANES):
        code[r] = np.float32(room[1, r])
    for r in range(LANES):
        value[r] = s[r] * levels[np.uint32(room[1, r])]


@numba.njit(inline="always")
def nearest_float(x, i, s, max_code, levels, code, value):  # pragma: no cover (compiled)
    """Round row i of x to multiples s of a small float's numbers, halves to even; arguments as in `nearest`.

    Normal numbers are rounded in their bits, those below the smallest one as multiples of its step.
    """
    mantissa, largest, zero, one = np.int32(levels[0]), levels[2], np.float32(0.0), np.int32(1)
    shift, sign = np.int32(23) - mantissa, np.int32((max_code + 1) / 2)
    offset, half = np.int32(levels[1] + 126) << mantissa, (one << (shift - one)) - one
    smallest, exponent = (offset + (one << mantissa)) << shift, np.int32(levels[1]) - mantissa + np.int32(127)
    step = np.int32(exponent << np.int32(23)).view(np.float32)  # a power of two, as pow takes its time
    steps = np.int32((np.int32(254) - exponent) << np.int32(23)).view(np.float32)
    for r in range(LANES):
        units = np.float32(x[i, r] / s[r] if s[r] != zero else zero)
        size = np.float32(min(abs(units), largest))
        bits, few = size.view(np.int32), np.float32(np.rint(size * steps))
        normal = np.int32((bits + half + ((bits >> shift) & one)) >> shift)
        small = np.int32((bits - smallest) >> np.int32(31))
        c = np.int32(normal - offset + (small & (np.int32(few) - normal + offset)))
        v = np.int32((normal << shift) + (small & (np.float32(few * step).view(np.int32) - (normal << shift))))
        below = np.int32((units.view(np.int32) & -c) >> np.int32(31))  # a negative number whose code isn't zero
        code[r] = np.float32(c + (below & sign))
        value[r] = s[r] * np.int32(v | (below << np.int32(31))).view(np.float32)


@compiled
def permute_columns(matrix, order):  # pragma: no cover (compiled)
    """Reorder the columns of matrix (rows, columns), float32 or uint8, to `order` (columns,) int64, in place."""
    for r in numba.prange(len(matrix)):
        row = matrix[r].copy()
        for j in range(len(order)):
            matrix[r, j] = row[order[j]]


@compiled
def sweep_columns(w, u, scale, zero, max_code, kind, levels, first, codes, errors):  # pragma: no cover (compiled)
    """Round consecutive columns of one GPTQ block, propagating each column's error to the block's later columns.

    Args:
        w: (stacks, rows, block) float32: the block's weights, of which those after the rounded columns are changed in
            place; linears that share an input share a stack.
        u: (stacks, block, block) float32: the block's diagonal part of each stack's upper Cholesky factor U.
        scale: (stacks, rows, count) float32: scales of the columns to round.
        zero: (stacks, rows, count) float32: zeros of the columns to round.
        max_code, kind, levels: the grid's arithmetic, as in `nearest`.
        first: index of the first column to round within the block.
        codes: (stacks, rows, block) float32, written.
        errors: (stacks, rows, block) float32, written: (w - q) / U_ii.
    """
    stacks, rows, block = w.shape
    tiles, stop = (rows + LANES - 1) // LANES, first + scale.shape[2]
    for index in numba.prange(stacks * tiles):
        stack, tile = index // tiles, index % tiles
        x, e = np.zeros((block, LANES), np.float32), np.empty((block, LANES), np.float32)
        s, z = np.ones((stop - first, LANES), np.float32), np.zeros((stop - first, LANES), np.float32)
        load(w[stack], tile, x)
        load(scale[stack], tile, s)
        load(zero[stack], tile, z)
        _sweep_tile(x, u[stack], s, z, max_code, kind, levels, first, e)
        store(x[first:stop], tile, codes[stack][:, first:stop])
        store(e[first:stop], tile, errors[stack][:, first:stop])
        store(x[stop:], tile, w[stack][:, stop:])


@numba.njit(inline="always")
def load(w, tile, x):  # pragma: no cover (compiled)
    """Transpose the tile's LANES rows of w (rows, cols) into x (cols, LANES)."""
    start, count = tile * LANES, min(LANES, len(w) - tile * LANES)
    for r in range(count):
        for j in range(w.shape[1]):
            x[j, r] = w[start + r, j]


@numba.njit(inline="always")
def store(x, tile, into):  # pragma: no cover (compiled)
    """Transpose x (cols, LANES) into the tile's LANES rows of `into` (rows, cols)."""
    start, count = tile * LANES, min(LANES, len(into) - tile * LANES)
    for r in range(count):
        for j in range(into.shape[1]):
            into[start + r, j] = x[j, r]


@numba.njit
def _sweep_tile(x, u, s, z, max_code, kind, levels, first, e):  # pragma: no cover (compiled)
    """Sweep some columns of one tile of LANES rows of one stack: weights in x become codes, errors are written to e.

    Columns are rounded AT_ONCE, then their errors subtracted from each later column, one after the other as ever.
    """
    block, stop = len(x), first + len(s)
    code, value, room = np.empty(LANES, np.float32), np.empty(LANES, np.float32), np.empty((ROOM, LANES), np.int32)
    for a in range(first, stop, AT_ONCE):
        whole = a + AT_ONCE <= stop
        for i in range(a, min(a + AT_ONCE, stop)):
            nearest(x, i, s[i - first], z[i - first], max_code, kind, levels, code, value, room)
            d = u[i, i]
            for r in range(LANES):
                e[i, r] = (x[i, r] - value[r]) / d
                x[i, r] = code[r]
            for j in range(i + 1, a + AT_ONCE if whole else block):
                uij = u[i, j]
                for r in range(LANES):
                    x[j, r] -= e[i, r] * uij
        for j in range(a + AT_ONCE if whole else block, block):
            u0, u1, u2, u3 = u[a, j], u[a + 1, j], u[a + 2, j], u[a + 3, j]
            for r in range(LANES):
                x[j, r] = x[j, r] - e[a, r] * u0 - e[a + 1, r] * u1 - e[a + 2, r] * u2 - e[a + 3, r] * u3


@numba.njit
def _output_error(delta, hessian, error):  # pragma: no cover (compiled)
    """Output error Δ H Δᵀ = Σ_i δ_i (H_ii δ_i + 2 Σ_{j>i} H_ij δ_j) of LANES rows.

    delta: (cols, LANES) float32. error: (LANES,) float32, written.
    """
    cols = len(delta)
    product = np.empty(LANES, np.float32)
    error[:] = np.float32(0.0)
    for i in range(cols):
        product[:] = np.float32(0.0)
        whole = i + 1 + (cols - i - 1) // 4 * 4
        for j in range(i + 1, whole, 4):  # four at a time, to write `product` to memory less often
            h0, h1, h2, h3 = hessian[i, j], hessian[i, j + 1], hessian[i, j + 2], hessian[i, j + 3]
            for r in range(LANES):
                a, b = h0 * delta[j, r] + h1 * delta[j + 1, r], h2 * delta[j + 2, r] + h3 * delta[j + 3, r]
                product[r] += a + b
        for j in range(whole, cols):
            h0 = hessian[i, j]
            for r in range(LANES):
                product[r] += h0 * delta[j, r]
        h = hessian[i, i]
        for r in range(LANES):
            error[r] += delta[i, r] * (h * delta[i, r] + np.float32(2.0) * product[r])


@numba.njit
def _weight_error(delta, error):  # pragma: no cover (compiled)
    """Weight error Σ |δ|^2.4 of LANES rows, to 1e-6: delta (cols, LANES), error (LANES,) written.

    |δ|^2.4 = y² r⁴ with y = δ² and r = y^(-1/5), which Newton's iteration r ← r (6 - y r⁵)/5 finds from a first guess
    by y's bits: numba has no vectorized pow.
    """
    y, r5 = np.empty(LANES, np.float32), np.empty(LANES, np.float32)
    bits, guess = y.view(np.int32), r5.view(np.int32)
    error[:] = np.float32(0.0)
    for i in range(len(delta)):
        for r in range(LANES):
            y[r] = delta[i, r] * delta[i, r] + np.float32(1e-30)  # its powers stay within float32
        for r in range(LANES):
            guess[r] = np.int32(np.float32(BITS_OF_ONE * 1.2) - np.float32(bits[r]) * np.float32(0.2))
        for _ in range(4):
            for r in range(LANES):
                g = r5[r]
                square = g * g
                r5[r] = g * (np.float32(1.2) - np.float32(0.2) * y[r] * square * square * g)
        for r in range(LANES):
            square = y[r] * r5[r] * r5[r]
            error[r] += square * square


def _best_range_tile_of(kind):
    """Compile the search in one tile for one kind of arithmetic: in one function for all it takes twice as long."""

    @numba.njit
    def best_range_tile(tile, w, scale, zero, max_code, levels, hessian, best):  # pragma: no cover (compiled)
        """Find the best candidate range for each of a tile's LANES rows, in one group."""
        start, count, cols = tile * LANES, min(LANES, len(w) - tile * LANES), w.shape[1]
        x, delta = np.zeros((cols, LANES), np.float32), np.empty((cols, LANES), np.float32)
        s, z = np.ones(LANES, np.float32), np.zeros(LANES, np.float32)
        code, value, error = np.empty(LANES, np.float32), np.empty(LANES, np.float32), np.empty(LANES, np.float32)
        least, room = np.full(LANES, np.float32(np.inf)), np.empty((ROOM, LANES), np.int32)
        best[start : start + count] = 0
        load(w, tile, x)
        for c in range(scale.shape[1]):
            for r in range(count):
                s[r], z[r] = scale[start + r, c], zero[start + r, c]
            for j in range(cols):
                nearest(x, j, s, z, max_code, kind, levels, code, value, room)
                for r in range(LANES):
                    delta[j, r] = value[r] - x[j, r]
            if len(hessian):
                _output_error(delta, hessian, error)
            else:
                _weight_error(delta, error)
            for r in range(count):
                if error[r] < least[r]:
                    least[r], best[start + r] = error[r], c

    return best_range_tile


_affine_tile, _minimum_tile, _table_tile, _float_tile = (
    _best_range_tile_of(kind) for kind in (AFFINE, MINIMUM, TABLE, FLOAT)
)


@compiled
def best_range(w, scale, zero, max_code, kind, levels, hessian, best):  # pragma: no cover (compiled)
    """For each row and group, find the candidate range that rounds with the least error; the first on a tie.

    The error is Δ H Δᵀ, or Σ |δ|^2.4 where no H is given.

    Args:
        w: (rows, groups, cols) float32: weights.
        scale: (rows, groups, candidates) float32: the candidates' scales.
        zero: (rows, groups, candidates) float32: the candidates' zeros.
        max_code, kind, levels: the grid's arithmetic, as in `nearest`.
        hessian: (groups, cols, cols) float32: the Hessian's diagonal block of each group; (groups, 0, 0): none.
        best: (rows, groups) int64, written: index of the best candidate.
    """
    tiles = (len(w) + LANES - 1) // LANES
    for index in numba.prange(tiles * w.shape[1]):
        group, tile = index // tiles, index % tiles
        part = w[:, group], scale[:, group], zero[:, group]
        if kind == AFFINE:
            _affine_tile(tile, *part, max_code, levels, hessian[group], best[:, group])
        elif kind == MINIMUM:
            _minimum_tile(tile, *part, max_code, levels, hessian[group], best[:, group])
        elif kind == TABLE:
            _table_tile(tile, *part, max_code, levels, hessian[group], best[:, group])
        else:
            _float_tile(tile, *part, max_code, levels, hessian[group], best[:, group])


@compiled
def least_squares(w, scale, max_code, kind, levels, weights, found):  # pragma: no cover (compiled)
    """For each row and group, find the scale with the least Σ h (ŵ - w)² for the codes of one of the candidates.

    A candidate s rounds w to v = s t. For these t the best scale is s Σ h w v / Σ h v²: it leaves (Σ h w v)² / Σ h v²
    less than Σ h w². Arguments are those of `best_range`, for arithmetics whose zero is 0, and:

    Args:
        weights: (groups, cols) float32: h.
        found: (rows, groups) float32, written: 0 where all candidates round to 0.
    """
    tiles = (len(w) + LANES - 1) // LANES
    for index in numba.prange(tiles * w.shape[1]):
        group, tile = index // tiles, index % tiles
        part = w[:, group], scale[:, group]
        _least_squares_tile(tile, part[0], part[1], max_code, kind, levels, weights[group], found[:, group])


@numba.njit
def _least_squares_tile(tile, w, scale, max_code, kind, levels, weights, found):  # pragma: no cover (compiled)
    """Find the best scale for each of a tile's LANES rows, in one group."""
    start, count, cols = tile * LANES, min(LANES, len(w) - tile * LANES), w.shape[1]
    x, s, z = np.zeros((cols, LANES), np.float32), np.ones(LANES, np.float32), np.zeros(LANES, np.float32)
    code, value, room = np.empty(LANES, np.float32), np.empty(LANES, np.float32), np.empty((ROOM, LANES), np.int32)
    product, square = np.empty(LANES, np.float32), np.empty(LANES, np.float32)
    most = np.zeros(LANES, np.float32)
    found[start : start + count] = np.float32(0.0)
    load(w, tile, x)
    for c in range(scale.shape[1]):
        for r in range(count):
            s[r] = scale[start + r, c]
        product[:], square[:] = np.float32(0.0), np.float32(0.0)
        for j in range(cols):
            nearest(x, j, s, z, max_code, kind, levels, code, value, room)
            h = weights[j]
            for r in range(LANES):
                product[r] += h * value[r] * x[j, r]
                square[r] += h * value[r] * value[r]
        for r in range(count):
            if product[r] * product[r] > most[r] * square[r]:
                best = product[r] / square[r]
                most[r], found[start + r] = product[r] * best, s[r] * best
