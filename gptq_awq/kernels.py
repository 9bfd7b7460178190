"""The column sweep's inner loop, compiled for the CPU.

Rows of a weight matrix do not depend on each other in GPTQ, so each thread takes rows and runs the whole
column recursion on data that stays in cache. Arithmetic and its order are those of the plain PyTorch loop in
solvers/gptq.py: the two agree bit for bit (tests/test_gptq.py).
"""

import numba
import numpy as np


@numba.njit(parallel=True, cache=True)
def sweep_affine(w, u, scale, zero, max_code, first, last, codes, errors):  # pragma: no cover (compiled)
    """Round columns first..last-1 of one block, passing each error on to the block's later columns.

    Args:
        w: (rows, block) float32, changed in place: the block's weights.
        u: (block, block) float32: the block's diagonal part of the upper factor.
        scale: (rows,) float32, of the one group that these columns belong to.
        zero: (rows,) float32, likewise.
        max_code: largest code, float32.
        first: first column of the segment.
        last: one past its last column.
        codes: (rows, block) float32, written.
        errors: (rows, block) float32, written: (w - q) / U_ii.
    """
    rows, block = w.shape
    for r in numba.prange(rows):
        s, z = scale[r], zero[r]
        for i in range(first, last):
            x = w[r, i]
            code = min(max(np.rint(x / s) + z, np.float32(0.0)), max_code)
            e = (x - s * (code - z)) / u[i, i]
            codes[r, i] = code
            errors[r, i] = e
            for j in range(i + 1, block):
                w[r, j] -= e * u[i, j]
