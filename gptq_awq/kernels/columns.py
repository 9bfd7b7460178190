"""The column sweep's inner loop, compiled for the CPU.

Rows of a weight matrix do not depend on each other in GPTQ, so each thread takes rows and runs the whole
column recursion on data that stays in cache. Arithmetic and its order are those of the plain PyTorch loop in
solvers/gptq.py: the two agree bit for bit (tests/test_gptq.py).
"""

import numba
import numpy as np

AFFINE, MINIMUM, TABLE = range(3)  # as in grids/arithmetic.py


@numba.njit(inline="always")
def nearest(x, s, z, max_code, kind, levels):  # pragma: no cover (compiled)
    """Code and value of the grid's nearest neighbour of x: `Arithmetic.encode` and `decode` for one number."""
    if kind == MINIMUM:
        x = x - z
    units = x / s if s != 0 else np.float32(0.0)
    if kind == AFFINE:
        code = min(max(np.rint(units) + z, np.float32(0.0)), max_code)
        return code, s * (code - z)
    if kind == MINIMUM:
        code = min(max(np.rint(units), np.float32(0.0)), max_code)
        return code, s * code + z
    best, least = 0, np.float32(np.inf)
    for c in range(len(levels)):
        distance = abs(units - levels[c])
        if distance < least:
            best, least = c, distance
    return np.float32(best), s * levels[best]


@numba.njit(parallel=True, cache=True)
def sweep_columns(w, u, scale, zero, max_code, kind, levels, first, codes, errors):  # pragma: no cover (compiled)
    """Round some neighbouring columns of one block, passing each error on to the block's later columns.

    Args:
        w: (rows, block) float32, changed in place: the block's weights.
        u: (block, block) float32: the block's diagonal part of the upper factor.
        scale: (rows, count) float32, of the columns to round.
        zero: (rows, count) float32, likewise.
        max_code, kind, levels: the grid's arithmetic; levels (n,) float32, empty but for tables.
        first: first of these columns within the block.
        codes: (rows, block) float32, written.
        errors: (rows, block) float32, written: (w - q) / U_ii.
    """
    rows, block = w.shape
    for r in numba.prange(rows):
        for i in range(first, first + scale.shape[1]):
            x = w[r, i]
            code, q = nearest(x, scale[r, i - first], zero[r, i - first], max_code, kind, levels)
            e = (x - q) / u[i, i]
            codes[r, i] = code
            errors[r, i] = e
            for j in range(i + 1, block):
                w[r, j] -= e * u[i, j]


@numba.njit(parallel=True, cache=True)
def best_range(w, scale, zero, max_code, kind, levels, hessian, best):  # pragma: no cover (compiled)
    """For each row, which of its candidate ranges rounds with the least output error Δ H Δᵀ; the first on a tie.

    Args:
        w: (rows, cols) float32: one group of columns.
        scale: (rows, candidates) float32.
        zero: (rows, candidates) float32.
        max_code, kind, levels: the grid's arithmetic, as above.
        hessian: (cols, cols) float32: the group's diagonal block.
        best: (rows,) int64, written.
    """
    rows, cols = w.shape
    for r in numba.prange(rows):
        delta = np.empty(cols, np.float32)
        least = np.float32(np.inf)
        best[r] = 0
        for c in range(scale.shape[1]):
            s, z = scale[r, c], zero[r, c]
            for j in range(cols):
                delta[j] = nearest(w[r, j], s, z, max_code, kind, levels)[1] - w[r, j]
            # Row by row of H: a loop over j that has no running sum, which the compiler can vectorize.
            product = np.zeros(cols, np.float32)
            for i in range(cols):
                d = delta[i]
                for j in range(cols):
                    product[j] += d * hessian[i, j]
            error = np.float32(0.0)
            for j in range(cols):
                error += product[j] * delta[j]
            if error < least:
                least = error
                best[r] = c
