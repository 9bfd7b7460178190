"""Coordinate descent over the codes of a group of columns (solvers/refine.py), compiled for the CPU.

Rows are side by side in vector registers, as in the column sweep; arithmetic and its order are those of the plain
PyTorch loop in solvers/refine.py.
"""

import numba
import numpy as np

from gptq_awq.kernels.columns import LANES, ROOM, load, nearest


@numba.njit(parallel=True, cache=True)
def descend(value, slope, h, scale, zero, max_code, kind, levels, passes, codes):  # pragma: no cover (compiled)
    """Round every column of a group anew, `passes` times, to where it makes up best for all other columns.

    Args:
        value: (rows, cols) float32, changed in place: dequantized weights.
        slope: (rows, cols) float32, changed in place: E H, half the derivative of the error by each weight.
        h: (cols, cols) float32: the group's diagonal block of H.
        scale, zero: (rows,) float32: scales and zeros of the group.
        max_code, kind, levels: the grid's arithmetic, as in `kernels.columns.nearest`.
        passes: times that all columns are taken.
        codes: (rows, cols) float32, written.
    """
    rows, cols = value.shape
    for tile in numba.prange((rows + LANES - 1) // LANES):
        start, count = tile * LANES, min(LANES, rows - tile * LANES)
        v, g = np.zeros((cols, LANES), np.float32), np.zeros((cols, LANES), np.float32)
        c = np.zeros((cols, LANES), np.float32)
        load(value, tile, v)
        load(slope, tile, g)
        s, z = np.ones(LANES, np.float32), np.zeros(LANES, np.float32)
        for r in range(count):
            s[r], z[r] = scale[start + r], zero[start + r]
        _descend_tile(v, g, h, s, z, max_code, kind, levels, passes, c)
        for r in range(count):
            for j in range(cols):
                value[start + r, j], slope[start + r, j], codes[start + r, j] = v[j, r], g[j, r], c[j, r]


@numba.njit
def _descend_tile(v, g, h, s, z, max_code, kind, levels, passes, c):  # pragma: no cover (compiled)
    """Descend over the columns of LANES rows: v, g and c are (cols, LANES), all changed in place."""
    cols = len(v)
    wanted, new, change = np.empty(LANES, np.float32), np.empty(LANES, np.float32), np.empty(LANES, np.float32)
    room = np.empty((ROOM, LANES), np.float32)
    for _ in range(passes):
        for i in range(cols):
            d = h[i, i]
            for r in range(LANES):
                wanted[r] = v[i, r] - g[i, r] / d
            nearest(wanted, s, z, max_code, kind, levels, c[i], new, room)
            for r in range(LANES):
                change[r] = new[r] - v[i, r]
                v[i, r] = new[r]
            for j in range(cols):
                hij = h[i, j]
                for r in range(LANES):
                    g[j, r] += change[r] * hij
