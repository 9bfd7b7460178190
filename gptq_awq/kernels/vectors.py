"""The sweep onto grids of vectors, compiled for the CPU: v columns and their signs are one entry of a codebook.

For v columns, whose part of the factor is U_b, rounding x to q leaves errors e = (x - q) U_b⁻¹, which cost ‖e‖² once
the later columns have made up for them as well as they can. Entries are tried with the signs that the recursion within
the vector asks for, column by column: e_i = (x_i - q_i) / U_ii, x_j ← x_j - e_i U_ij. Only those nearest to x by plain
distance are: 24 of four columns or 32 of eight hold the cheapest of all for 99.4 to 100% of a model's vectors
(docs/log.md, 2026-11-28). Rows are taken `LANES` at a time, side by side in vector registers, as in columns.py.

What is compared and chosen for each lane is bits: floats that aren't negative have their bits' order, and LLVM puts
choices by comparisons of floats into no vector registers.
"""

import numba
import numpy as np

from gptq_awq.kernels.columns import LANES, load
from gptq_awq.kernels.compiled import compiled

UNIT = 8
"""Columns that share a parity of signs."""
CANDIDATE = 31
"""The last bits of a cost's, which say the candidate."""
ROOM = 6
"""Rows of LANES numbers that functions of a vector work in: allocated once per tile, not for each entry tried."""


@numba.njit
def _points(y, middles, point, below):  # pragma: no cover (compiled)
    """Write the lattice point of all levels that is nearest to each lane's magnitudes.

    Args:
        y: (v, LANES) float32: the columns, in multiples of the scale.
        middles: (L - 1,) float32: middles between levels.
        point: (LANES,) int32, written: the columns' levels as digits, the first column's the most significant.
        below: (LANES,) float32, overwritten.
    """
    bits = below.view(np.int32)
    point[:] = 0
    for i in range(len(y)):
        for r in range(LANES):
            point[r] *= np.int32(len(middles) + 1)
        for b in range(len(middles)):
            for r in range(LANES):
                below[r] = middles[b] - abs(y[i, r])
            for r in range(LANES):
                point[r] -= bits[r] >> np.int32(31)


@numba.njit
def _weaken(y, levels, point):  # pragma: no cover (compiled)
    """Lower each lane's smallest magnitude to the least level: there, turning a sign costs little."""
    v = len(y)
    for r in range(LANES):
        weak = 0
        for i in range(1, v):
            if abs(y[i, r]) < abs(y[weak, r]):
                weak = i
        place = levels ** (v - 1 - weak)
        point[r] -= point[r] // place % levels * place


@numba.njit
def _look_up(table, point, near):  # pragma: no cover (compiled)
    """Write the first entries near each lane's point (LANES,), of table (points, C), to near (c, LANES)."""
    for r in range(LANES):
        for c in range(len(near)):
            near[c, r] = table[np.uint32(point[r]), c]


@numba.njit
def _candidates(y, middles, table, even, near, room):  # pragma: no cover (compiled)
    """Write each lane's candidates, of the codebook's entries, to near (C, LANES) uint32.

    Where the number of negative signs must be even, a quarter of them are where a sign is turned cheaply.
    """
    point = room[0].view(np.int32)
    _points(y, middles, point, room[1])
    own = len(near) * 3 // 4 if even else len(near)
    _look_up(table, point, near[:own])
    if even:
        _weaken(y, len(middles) + 1, point)
        _look_up(table, point, near[own:])


@numba.njit
def _try_entry(y, u, magnitudes, entry, even, e, cost, penalty, odd, room):  # pragma: no cover (compiled)
    """Find what an entry costs each lane.

    Args:
        y: (v, LANES) float32: the columns, in multiples of the scale.
        u: (v, v) float32: the columns' part of U.
        magnitudes: (v, K) float32: of the codebook's entries.
        entry: (LANES,) uint32: the entries.
        even: whether penalty and odd are wanted.
        e: (v, LANES) float32, written: errors.
        cost: (LANES,) float32, written: Σ e².
        penalty: (LANES,) float32, written: the least that turning a sign adds.
        odd: (LANES,) int32, written: negative where the number of negative signs is odd.
        room: (3, LANES) float32, overwritten.
    """
    t, m, turning = room[0], room[1], room[2]
    sign, penalties, turnings = t.view(np.int32), penalty.view(np.int32), turning.view(np.int32)
    cost[:], penalty[:], odd[:] = np.float32(0.0), np.float32(np.inf), 0
    for i in range(len(y)):
        d, row = np.float32(1.0) / u[i, i], magnitudes[i]
        t[:] = y[i]
        for j in range(i):
            uji = u[j, i]
            for r in range(LANES):
                t[r] -= e[j, r] * uji
        for r in range(LANES):
            m[r] = row[entry[r]]
        for r in range(LANES):
            error = (abs(t[r]) - m[r]) * d
            cost[r] += error * error
            e[i, r] = -error if t[r] < np.float32(0.0) else error
        if even:
            for r in range(LANES):
                odd[r] ^= sign[r]
                turning[r] = np.float32(4.0) * abs(t[r]) * m[r] * d * d
            for r in range(LANES):
                penalties[r] = min(penalties[r], turnings[r])


@numba.njit
def _best(y, u, magnitudes, near, even, keys, e, room):  # pragma: no cover (compiled)
    """Find the best of each lane's candidates.

    Args:
        y, u, magnitudes: as in `_try_entry`.
        near: (C, LANES) uint32: the candidates.
        even: whether to tell them by the parity of their signs; if not, the first row is written for all.
        keys: (2, LANES) int32, written: with an even and with an odd number of negative signs, the bits of the least
            cost, the last of which say the candidate.
        e, room: (v, LANES) and (ROOM, LANES) float32, overwritten.
    """
    cost, penalty, odd, rest = room[0], room[1], room[2].view(np.int32), room[3:]
    costs, penalties = cost.view(np.int32), penalty.view(np.int32)
    keys[:] = np.int32(2**31 - 1)
    for c in range(len(near)):
        index = np.int32(c)
        _try_entry(y, u, magnitudes, near[c], even, e, cost, penalty, odd, rest)
        if not even:
            for r in range(LANES):
                keys[0, r] = min(keys[0, r], costs[r] & ~np.int32(CANDIDATE) | index)
            continue
        for r in range(LANES):
            penalty[r] += cost[r]
        for r in range(LANES):
            own = costs[r] & ~np.int32(CANDIDATE) | index
            other = penalties[r] & ~np.int32(CANDIDATE) | index
            mask = odd[r] >> np.int32(31)
            keys[0, r] = min(keys[0, r], (own & ~mask) | (other & mask))
            keys[1, r] = min(keys[1, r], (own & mask) | (other & ~mask))


@numba.njit
def _choose(keys, near, even, last, parity, odd, entry):  # pragma: no cover (compiled)
    """Choose each lane's entry, and the parity of its signs.

    Args:
        keys, near, even: as `_best` has them.
        last: whether the parity of a unit must be even with this vector.
        parity: (LANES,) int32, changed: the unit's so far.
        odd, entry: (LANES,) int32 and uint32, written.
    """
    odd[:] = 0
    if even:
        for r in range(LANES):
            odd[r] = parity[r] if last else np.int32(keys[1, r] < keys[0, r])
            parity[r] ^= odd[r]
    for r in range(LANES):
        entry[r] = near[keys[odd[r], r] & np.int32(CANDIDATE), r]


@numba.njit
def _signed(y, u, m, value, e):  # pragma: no cover (compiled)
    """Give magnitudes m (v, LANES) the signs that the recursion asks for; y is left as the recursion has it.

    e: (LANES,) float32, overwritten.
    """
    for i in range(len(y)):
        for r in range(LANES):
            value[i, r] = -m[i, r] if y[i, r] < np.float32(0.0) else m[i, r]
            e[r] = (y[i, r] - value[i, r]) / u[i, i]
        for j in range(i + 1, len(y)):
            uij = u[i, j]
            for r in range(LANES):
                y[j, r] -= e[r] * uij


@numba.njit
def _turn(y, u, m, odd, value):  # pragma: no cover (compiled)
    """Turn the sign that is cheapest to turn where the parity of the signs is another; y as `_signed` leaves it."""
    for r in range(LANES):
        negatives, turned, penalty = np.int32(0), 0, np.float32(np.inf)
        for i in range(len(y)):
            negatives ^= np.int32(y[i, r] < np.float32(0.0))
            turning = abs(y[i, r]) * m[i, r] / (u[i, i] * u[i, i])
            if turning < penalty:
                penalty, turned = turning, i
        if negatives != odd[r]:
            value[turned, r] = -value[turned, r]


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


@compiled
def sweep_vectors(w, u, scale, magnitudes, indices, middles, table, even, codes, errors):  # pragma: no cover (compiled)
    """Round all columns of one GPTQ block, vector by vector, propagating errors to the block's later columns.

    Args:
        w: (stacks, rows, block) float32, changed in place: the block's weights.
        u: (stacks, block, block) float32: the block's diagonal part of each stack's factor U.
        scale: (stacks, rows, block) float32: scales of the columns; those of a vector are equal.
        magnitudes: (v, K) float32: of the codebook's entries.
        indices: (K, v) int32: each magnitude's index among the grid's levels.
        middles: (L - 1,) float32: middles between levels.
        table: (L^v, C) uint32, C ≤ 32: the entries to try, as `_candidates` has it.
        even: whether the number of negative signs in `UNIT` columns must be even.
        codes: (stacks, rows, block) float32, written: index of the level, plus L for a negative sign.
        errors: (stacks, rows, block) float32, written: (w - q) / U_ii.
    """
    tiles = (w.shape[1] + LANES - 1) // LANES
    for index in numba.prange(len(w) * tiles):
        k, tile = index // tiles, index % tiles
        _sweep_tile(tile, w[k], u[k], scale[k], magnitudes, indices, middles, table, even, codes[k], errors[k])


@numba.njit
def _sweep_tile(
    tile, w, u, scale, magnitudes, indices, middles, table, even, codes, errors
):  # pragma: no cover (compiled)
    """Sweep the columns of one tile of LANES rows of one stack."""
    block, v = w.shape[1], len(magnitudes)
    start, count = tile * LANES, min(LANES, len(w) - tile * LANES)
    x, s, e = np.zeros((block, LANES), np.float32), np.zeros(LANES, np.float32), np.empty(LANES, np.float32)
    y, m, value = np.empty((v, LANES), np.float32), np.empty((v, LANES), np.float32), np.empty((v, LANES), np.float32)
    near, keys = np.empty((table.shape[1], LANES), np.uint32), np.empty((2, LANES), np.int32)
    entry, odd, parity = np.empty(LANES, np.uint32), np.zeros(LANES, np.int32), np.zeros(LANES, np.int32)
    trial, room = np.empty((v, LANES), np.float32), np.empty((ROOM, LANES), np.float32)
    load(w, tile, x)
    for a in range(0, block, v):
        part = u[a : a + v, a : a + v]
        s[:count] = scale[start : start + count, a]
        for i in range(v):
            for r in range(LANES):
                y[i, r] = x[a + i, r] / s[r] if s[r] != np.float32(0.0) else np.float32(0.0)
        _candidates(y, middles, table, even, near, room)
        _best(y, part, magnitudes, near, even, keys, trial, room)
        _choose(keys, near, even, (a + v) % UNIT == 0, parity, odd, entry)
        for i in range(v):
            for r in range(LANES):
                m[i, r] = magnitudes[i, entry[r]]
        _signed(y, part, m, value, e)
        if even:
            _turn(y, part, m, odd, value)
        _write_codes(entry, indices, value, len(middles) + 1, codes[start : start + count, a : a + v])
        for i in range(v):
            value[i] *= s
            _propagate(x, a + i, value[i], u, e)
            errors[start : start + count, a + i] = e[:count]
    w[start : start + count] = x[:, :count].T


@numba.njit
def _write_codes(entry, indices, value, levels, codes):  # pragma: no cover (compiled)
    """Write the levels of entries' columns, plus the number of levels for a negative sign, to codes (rows, v)."""
    for r in range(len(codes)):
        for i in range(len(value)):
            negative = levels if value[i, r] < np.float32(0.0) else 0
            codes[r, i] = indices[entry[r], i] + negative
