"""Coordinate descent over the codes and scales of a rounded weight (solvers/refine.py), compiled for the CPU.

Rows do not depend on each other, so each thread takes a few and runs all passes over them on data that stays in cache.
Columns lie side by side in vector registers: a row costs the same in whatever company, so that tiles of few rows (those
of solvers/yaqa.py) waste nothing but a part of `nearest`. Most codes stay what they are, and what stays costs nothing.
"""

import numba
import numpy as np

from gptq_awq.kernels.columns import LANES, MINIMUM, ROOM, nearest
from gptq_awq.kernels.compiled import compiled
from gptq_awq.kernels.rank_k import bfloat16

KEPT, FLOAT32, FLOAT16, BFLOAT16 = range(4)
"""What scales are stored in; KEPT: they are not free."""
FARTHEST = np.float32(2.0)
"""Largest factor by which a scale grows or shrinks in one step."""
LEAST_NORMAL, STEP = np.float32(2.0**-14), np.float32(2.0**-24)
"""Of float16: the least normal number, and the distance of smaller ones."""
LARGEST = np.array([np.inf, np.finfo(np.float32).max, 65504.0, 3.3895314e38], np.float32)
SMALLEST = np.array([0.0, 0.0, 2.0**-24, 9.1835e-41], np.float32)
TINY = np.finfo(np.float32).tiny


@compiled
def descend(
    value, target, hessian, starts, scale, zero, max_code, kind, levels, storage, height, passes, inner, codes
):  # pragma: no cover (compiled)
    """Take every group of columns, and then its scale, `passes` times to where it makes up best for all other columns.

    Args:
        value: (rows, cols) float32, changed in place: dequantized weights.
        target: (rows, cols) float32: weights that they stand for.
        hessian: (cols, cols) float32: H.
        starts: (groups + 1,) int64: where each group's columns begin, and where the last one's end.
        scale, zero: (rows, groups) float32, changed in place where scales are free.
        max_code, kind, levels: the grid's arithmetic, as in `kernels.columns.nearest`.
        storage: what scales are stored in; KEPT: they stay.
        height: rows that are taken together, at most LANES; results don't depend on it.
        passes: times that every group is taken.
        inner: times that a group's columns are taken before the next group's.
        codes: (rows, cols) float32, written.
    """
    rows = len(value)
    widest = 0
    for group in range(len(starts) - 1):
        widest = max(widest, starts[group + 1] - starts[group])
    for part in numba.prange((rows + height - 1) // height):
        own = slice(part * height, min(rows, (part + 1) * height))
        E, slope = value[own] - target[own], np.empty((own.stop - own.start, widest), np.float32)
        columns, room = np.empty((5, LANES), np.float32), np.empty((ROOM, LANES), np.int32)
        work = np.empty((2, widest), np.float32)
        for _ in range(passes):
            for group in range(len(starts) - 1):
                here = slice(starts[group], starts[group + 1])
                _add_products(E, hessian, here, slope)
                s, z = scale[own, group], zero[own, group]
                _descend_group(
                    value[own], slope, hessian, here, s, z, max_code, kind, levels, inner, codes[own], columns, room
                )
                for r in range(own.start, own.stop):
                    v, r_in_part = value[r, here], r - own.start
                    if storage != KEPT:
                        row = codes[r, here]
                        _rescale(v, slope[r_in_part], hessian, here, scale[r], zero[r], group, kind, storage, row, work)
                    for j in range(len(v)):
                        E[r_in_part, here.start + j] = v[j] - target[r, here.start + j]


@numba.njit(fastmath={"contract"})
def _add_products(E, hessian, here, slope):  # pragma: no cover (compiled)
    """Write (E H) at the columns `here` to the first columns of `slope`; four rows of H at a time."""
    width, columns = here.stop - here.start, E.shape[1]
    slope[:, :width] = np.float32(0.0)
    for k in range(0, columns - 3, 4):
        a, b, c, d = hessian[k, here], hessian[k + 1, here], hessian[k + 2, here], hessian[k + 3, here]
        for r in range(len(E)):
            s, p, q, t, u = slope[r], E[r, k], E[r, k + 1], E[r, k + 2], E[r, k + 3]
            for j in range(width):
                s[j] += p * a[j] + q * b[j] + t * c[j] + u * d[j]
    for k in range(columns - columns % 4, columns):
        a = hessian[k, here]
        for r in range(len(E)):
            s, p = slope[r], E[r, k]
            for j in range(width):
                s[j] += p * a[j]


@numba.njit(fastmath={"contract"})
def _descend_group(
    v, slope, hessian, here, s, z, max_code, kind, levels, inner, c, columns, room
):  # pragma: no cover (compiled)
    """Descend over the columns `here` of some rows: v, c (rows, cols) and slope (rows, width) are changed in place."""
    rows, first, width = len(v), here.start, here.stop - here.start
    code, new, scales, zeros = columns[1], columns[2], columns[3], columns[4]
    columns[0, :], scales[:], zeros[:] = np.float32(0.0), np.float32(1.0), np.float32(0.0)
    for r in range(rows):
        scales[r], zeros[r] = s[r], z[r]
    for _ in range(inner):
        for i in range(width):
            diagonal = hessian[first + i, first + i]
            for r in range(rows):
                columns[0, r] = v[r, first + i] - slope[r, i] / diagonal
            nearest(columns, 0, scales, zeros, max_code, kind, levels, code, new, room)
            for r in range(rows):
                c[r, first + i] = code[r]
                change = new[r] - v[r, first + i]
                if change != np.float32(0.0):
                    v[r, first + i] = new[r]
                    for j in range(width):
                        slope[r, j] += change * hessian[first + i, first + j]


@numba.njit(fastmath={"contract", "reassoc", "nsz"})
def _dot(a, b, n):  # pragma: no cover (compiled)
    """Sum of the products of the first n entries, in any order."""
    total = np.float32(0.0)
    for j in range(n):
        total += a[j] * b[j]
    return total


@numba.njit(fastmath={"contract"})
def _times(x, hessian, here, out):  # pragma: no cover (compiled)
    """Write x H, for a row x of a group's columns `here`, to the first entries of `out`."""
    out[: len(x)] = np.float32(0.0)
    for i in range(len(x)):
        a, h = x[i], hessian[here.start + i, here]
        for j in range(len(x)):
            out[j] += a * h[j]


@numba.njit
def _rescale(v, slope, hessian, here, s, z, group, kind, storage, c, work):  # pragma: no cover (compiled)
    """Change scale and zero of a row's group to what leaves the least error to its codes, and v with them.

    They stay where storing them spoils that.
    """
    width, product, change = len(v), work[0], work[1]
    _times(v, hessian, here, product)
    curvature = _dot(product, v, width)
    factor = np.float32(1.0) - _dot(v, slope, width) / max(curvature, TINY)
    factor = min(max(factor, np.float32(1.0) / FARTHEST), FARTHEST)
    scale, zero = stored(s[group] * factor, storage, kind != MINIMUM), z[group]
    if kind == MINIMUM:
        zero = stored(z[group] * factor, storage, False)
        for j in range(width):
            change[j] = scale * c[j] + zero - v[j]
    else:
        for j in range(width):
            change[j] = scale * (c[j] - zero) - v[j]
    _times(change[:width], hessian, here, product)
    if np.float32(2.0) * _dot(slope, change, width) + _dot(product, change, width) < np.float32(0.0):
        s[group], z[group] = scale, zero
        for j in range(width):
            v[j] = scale * c[j] + zero if kind == MINIMUM else scale * (c[j] - zero)


@numba.njit
def stored(x, storage, positive):  # pragma: no cover (compiled)
    """Round a float32 to the numbers that scales are stored in; one that must be positive doesn't become 0."""
    if storage == FLOAT32:
        return x
    size = min(abs(x), LARGEST[storage])
    if positive:
        size = max(size, SMALLEST[storage])
    if storage == FLOAT16 and size < LEAST_NORMAL:
        size = np.float32(np.rint(size / STEP)) * STEP
    elif storage == FLOAT16:
        bits = np.uint32(np.float32(size).view(np.uint32))
        odd = (bits >> np.uint32(13)) & np.uint32(1)
        bits = np.uint32((bits + np.uint32(0xFFF) + odd) & np.uint32(0xFFFFE000))
        size = bits.view(np.float32)
    else:
        bits = np.uint32(bfloat16(np.uint32(np.float32(size).view(np.uint32)))) << np.uint32(16)
        size = np.uint32(bits).view(np.float32)
    return size if positive or x >= np.float32(0.0) else -size
