"""The sweep onto grids of vectors, compiled for the CPU: v columns and their signs are one entry of a codebook.

For a unit of columns b, whose part of the factor is U_b, rounding x to q leaves errors e = (x - q) U_b⁻¹, which cost
‖e‖² once the later columns have made up for them as well as they can. Each entry's magnitudes are tried with the signs
that the recursion within the unit asks for, column by column: e_i = (x_i - q_i) / U_ii, x_j ← x_j - e_i U_ij. Rows are
taken `LANES` at a time, side by side in vector registers, as in columns.py.
"""

import numba
import numpy as np

from gptq_awq.kernels.columns import LANES, _load

UNIT = 8
"""Most columns of a unit: signs with a parity are of eight columns."""


@numba.njit
def _try_entries(y, u, entries, first, costs, chosen, flips):  # pragma: no cover (compiled)
    """Find the best entry for v columns of each lane, by the parity of its signs.

    Args:
        y: (v, LANES) float32: the columns, in multiples of the scale.
        u: (n, n) float32: the unit's part of U; the v columns begin at `first` in it.
        entries: (K, v) float32: magnitudes.
        first: index of the first column.
        costs: (2, LANES) float32, written: least cost with an even and with an odd number of negative signs.
        chosen, flips: (2, LANES) int32, written: the entry, and the column whose sign is turned against its will; -1.
    """
    v = len(y)
    e, t = np.empty((v, LANES), np.float32), np.empty(LANES, np.float32)
    cost, odd = np.empty(LANES, np.float32), np.empty(LANES, np.int32)
    penalty, turned = np.empty(LANES, np.float32), np.empty(LANES, np.int32)
    costs[:] = np.float32(np.inf)
    for k in range(len(entries)):
        cost[:] = np.float32(0.0)
        odd[:] = 0
        penalty[:] = np.float32(np.inf)
        turned[:] = -1
        for i in range(v):
            m, d = entries[k, i], np.float32(1.0) / u[first + i, first + i]
            t[:] = y[i]
            for j in range(i):
                uji = u[first + j, first + i]
                for r in range(LANES):
                    t[r] -= e[j, r] * uji
            for r in range(LANES):
                negative = t[r] < np.float32(0.0)
                size = -t[r] if negative else t[r]
                error = (size - m) * d
                cost[r] += error * error
                e[i, r] = -error if negative else error
                odd[r] ^= np.int32(1) if negative else np.int32(0)
                turning = np.float32(4.0) * size * m * d * d
                least = turning < penalty[r]
                penalty[r] = turning if least else penalty[r]
                turned[r] = np.int32(i) if least else turned[r]
        for r in range(LANES):
            own, other = odd[r], 1 - odd[r]
            if cost[r] < costs[own, r]:
                costs[own, r], chosen[own, r], flips[own, r] = cost[r], k, -1
            if cost[r] + penalty[r] < costs[other, r]:
                costs[other, r], chosen[other, r], flips[other, r] = cost[r] + penalty[r], k, turned[r]


@numba.njit
def _take(x, r, s, u, entries, first, entry, flip, value):  # pragma: no cover (compiled)
    """Write an entry's values for lane r to value (n,) from `first` on, and its errors' effect to x (n, LANES)."""
    v = entries.shape[1]
    signs = np.empty(UNIT, np.float32)
    y = np.empty(UNIT, np.float32)
    for i in range(v):
        y[i] = x[first + i, r]
    for i in range(v):  # the signs that the recursion asks for
        signs[i] = np.float32(-1.0) if y[i] < np.float32(0.0) else np.float32(1.0)
        error = (y[i] - signs[i] * s * entries[entry, i]) / u[first + i, first + i]
        for j in range(i + 1, v):
            y[j] -= error * u[first + i, first + j]
    if flip >= 0:
        signs[flip] = -signs[flip]
    for i in range(v):
        value[first + i] = signs[i] * s * entries[entry, i]
        error = (x[first + i, r] - value[first + i]) / u[first + i, first + i]
        for j in range(first + i + 1, len(x)):
            x[j, r] -= error * u[first + i, j]


@numba.njit
def _round_unit(x, scale, u, entries, even, value, picked):  # pragma: no cover (compiled)
    """Round a unit of n columns of LANES rows.

    Args:
        x: (n, LANES) float32: the columns, changed.
        scale: (LANES,) float32.
        u: (n, n) float32: the unit's part of U.
        entries: (K, v) float32: magnitudes.
        even: whether the number of negative signs in the unit must be even.
        value: (n, LANES) float32, written.
        picked: (n / v, LANES) int32, written: entries.
    """
    n, v = len(x), entries.shape[1]
    parts = n // v
    y, one = np.zeros((v, LANES), np.float32), np.empty(n, np.float32)
    costs, chosen, flips = (
        np.empty((2, LANES), np.float32),
        np.zeros((2, LANES), np.int32),
        np.full((2, LANES), -1, np.int32),
    )
    kept, kept_flips = np.zeros((parts, LANES), np.int32), np.full((parts, LANES), -1, np.int32)
    parity = np.zeros(LANES, np.int32)
    for part in range(parts):
        first = part * v
        for i in range(v):
            for r in range(LANES):
                y[i, r] = x[first + i, r] / scale[r] if scale[r] != np.float32(0.0) else np.float32(0.0)
        _try_entries(y, u, entries, first, costs, chosen, flips)
        last = part == parts - 1
        for r in range(LANES):
            which = 0 if costs[0, r] <= costs[1, r] else 1
            if even and last:
                which = parity[r]
            parity[r] ^= which
            kept[part, r], kept_flips[part, r] = chosen[which, r], flips[which, r]
            _take(x, r, scale[r], u, entries, first, kept[part, r], kept_flips[part, r], one)
            for i in range(v):
                value[first + i, r] = one[first + i]
    picked[:] = kept


@numba.njit
def _propagate(x, i, value, u, e):  # pragma: no cover (compiled)
    """Write the errors of column i, rounded to `value`, to e, and let the later columns of x make up for them."""
    d = u[i, i]
    for r in range(LANES):
        e[r] = (x[i, r] - value[r]) / d
    for j in range(i + 1, len(x)):
        uij = u[i, j]
        for r in range(LANES):
            x[j, r] -= e[r] * uij


@numba.njit(parallel=True, cache=True)
def sweep_vectors(w, u, scale, entries, indices, levels, unit, even, codes, errors):  # pragma: no cover (compiled)
    """Round all columns of one GPTQ block, unit by unit, propagating errors to the block's later columns.

    Args:
        w: (stacks, rows, block) float32, changed in place: the block's weights.
        u: (stacks, block, block) float32: the block's diagonal part of each stack's factor U.
        scale: (stacks, rows, block) float32: scales of the columns; those of a unit are equal.
        entries: (K, v) float32: magnitudes of the codebook's entries.
        indices: (K, v) int32: each magnitude's index among the grid's levels.
        levels: number of levels; a negative sign adds it to a code.
        unit: number of columns rounded together, a multiple of v.
        even: whether the number of negative signs in a unit must be even.
        codes: (stacks, rows, block) float32, written.
        errors: (stacks, rows, block) float32, written: (w - q) / U_ii.
    """
    stacks, rows, block = w.shape
    tiles = (rows + LANES - 1) // LANES
    v = entries.shape[1]
    for index in numba.prange(stacks * tiles):
        stack, tile = index // tiles, index % tiles
        start, count = tile * LANES, min(LANES, rows - tile * LANES)
        x, part = np.zeros((block, LANES), np.float32), np.zeros((unit, LANES), np.float32)
        s, e = np.zeros(LANES, np.float32), np.empty(LANES, np.float32)
        value, picked = np.zeros((unit, LANES), np.float32), np.zeros((unit // v, LANES), np.int32)
        _load(w[stack], tile, x)
        for a in range(0, block, unit):
            for r in range(count):
                s[r] = scale[stack, start + r, a]
            part[:] = x[a : a + unit]
            _round_unit(part, s, u[stack, a : a + unit, a : a + unit], entries, even, value, picked)
            for i in range(unit):
                _propagate(x, a + i, value[i], u[stack], e)
                for r in range(count):
                    negative = levels if value[i, r] < np.float32(0.0) else 0
                    codes[stack, start + r, a + i] = indices[picked[i // v, r], i % v] + negative
                    errors[stack, start + r, a + i] = e[r]
        for r in range(count):
            for j in range(block):
                w[stack, start + r, j] = x[j, r]
