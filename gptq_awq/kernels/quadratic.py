"""Output error tr(ΔHΔᵀ) in bfloat16 with float32 sums, on CPUs that have dpbf16ps (AVX512-BF16).

A search for scales computes it a dozen times per weight, so rounding, the product and its trace are one pass here:
Δ stays in cache, nothing of its size is written. H is symmetric: with T its part above the diagonal and half of
the diagonal, tr(ΔHΔᵀ) = 2 Σ (ΔT) ∘ Δ, and ΔT takes half of the work of ΔH.

    panel of PANEL rows:  Δ = (nearest(w) - w) / s         laid out as rank_k.py lays out X: pairs of columns in a word
    for each panel of PANEL columns of T:  error += 2 Σ (Δ T_panel) ∘ Δ_panel
"""

import numba
import numpy as np

from gptq_awq.kernels.columns import LANES, ROOM, nearest
from gptq_awq.kernels.compiled import compiled
from gptq_awq.kernels.rank_k import PANEL, ROWS, add_tile, bfloat16


@compiled
def _pack(hessian, panels):  # pragma: no cover (compiled)
    """Lay out T in panels (panels, words, PANEL), two rows of a column in a word; zeros below the diagonal."""
    n = len(hessian)
    for p in numba.prange(len(panels)):
        row = np.zeros((2, PANEL), np.float32)
        bits = row.view(np.uint32)
        for k in range(min(panels.shape[1], (p + 1) * PANEL // 2)):
            for i in range(2):
                for j in range(PANEL):
                    a, b = 2 * k + i, p * PANEL + j
                    inside = a < n and b < n and a <= b
                    row[i, j] = (hessian[a, b] / (np.float32(2.0) if a == b else np.float32(1.0))) if inside else 0.0
            for j in range(PANEL):
                panels[p, k, j] = bfloat16(bits[0, j]) | (bfloat16(bits[1, j]) << np.uint32(16))


@numba.njit
def _trace(delta, panels, product):  # pragma: no cover (compiled)
    """Trace 2 Σ (ΔT) ∘ Δ of a panel of rows: delta (words, PANEL) uint32, product (PANEL, PANEL) float32 scratch."""
    total = 0.0
    two = np.zeros((2, PANEL), np.uint32)
    values = two.view(np.float32)
    for p in range(len(panels)):
        words = min(len(delta), (p + 1) * PANEL // 2)  # below them T is zero
        product[:] = np.float32(0.0)
        for r in range(0, PANEL, ROWS):
            # productᵀ: its rows are columns of T, so that Δ needs no other layout
            left, right = panels[p].ctypes.data + 4 * r, delta.ctypes.data
            add_tile(left, right, words, product.ctypes.data + 4 * r * PANEL, PANEL)  # pyright: ignore[reportCallIssue]
        for j in range(0, PANEL, 2):
            word = (p * PANEL + j) // 2
            if word < len(delta):
                error = np.float32(0.0)
                for r in range(PANEL):
                    two[0, r] = delta[word, r] << np.uint32(16)
                    two[1, r] = delta[word, r] & np.uint32(0xFFFF0000)
                for r in range(PANEL):
                    product[j, r] = product[j, r] * values[0, r] + product[j + 1, r] * values[1, r]
                for r in range(PANEL):
                    error += product[j, r]
                total += error
    return 2.0 * total


@numba.njit
def _lay_out(row, delta, r):  # pragma: no cover (compiled)
    """Round a row of Δ, float32, to bfloat16 and write it to column r of the panel delta (words, PANEL)."""
    bits = row.view(np.uint32)
    for k in range(len(delta)):
        delta[k, r] = bfloat16(bits[2 * k]) | (bfloat16(bits[2 * k + 1]) << np.uint32(16))


@compiled
def _traces(delta, panels, errors):  # pragma: no cover (compiled)
    """Write tr(ΔHΔᵀ) of every PANEL rows of Δ to errors (tiles,)."""
    rows, n = delta.shape
    for tile in numba.prange(len(errors)):
        words, row = np.zeros((panels.shape[1], PANEL), np.uint32), np.zeros(2 * panels.shape[1], np.float32)
        for r in range(min(PANEL, rows - tile * PANEL)):
            row[:n] = delta[tile * PANEL + r]
            _lay_out(row, words, r)
        errors[tile] = _trace(words, panels, np.empty((PANEL, PANEL), np.float32))


@compiled
def _rounding_traces(
    w, scale, zero, size, max_code, kind, levels, divisor, panels, errors
):  # pragma: no cover (compiled)
    """Round w and write tr(ΔHΔᵀ) of every PANEL rows to errors (tiles,); see `Quadratic.of_rounding`."""
    rows, n = w.shape
    for tile in numba.prange(len(errors)):
        words, row = np.zeros((panels.shape[1], PANEL), np.uint32), np.zeros(2 * panels.shape[1] + LANES, np.float32)
        x, s, z = np.zeros((1, LANES), np.float32), np.ones(LANES, np.float32), np.zeros(LANES, np.float32)
        code, value = np.empty(LANES, np.float32), np.empty(LANES, np.float32)
        room = np.empty((ROOM, LANES), np.int32)
        for r in range(min(PANEL, rows - tile * PANEL)):
            here = tile * PANEL + r
            for group in range(scale.shape[1]):
                stop = min((group + 1) * size, n)
                s[:], z[:] = scale[here, group], zero[here, group]
                for start in range(group * size, stop, LANES):
                    count = min(LANES, stop - start)
                    x[0, :count] = w[here, start : start + count]
                    nearest(x, 0, s, z, max_code, kind, levels, code, value, room)
                    for j in range(count):
                        row[start + j] = (value[j] - x[0, j]) / divisor[start + j]
            _lay_out(row[: 2 * panels.shape[1]], words, r)
        errors[tile] = _trace(words, panels, np.empty((PANEL, PANEL), np.float32))


class Quadratic:
    """Quadratic form Δ → tr(ΔHΔᵀ) of a Hessian H (n, n) float32, which is kept in bfloat16."""

    def __init__(self, hessian: np.ndarray) -> None:
        n = len(hessian)
        columns = -(-n // PANEL)
        self._panels = np.zeros((columns, -(-n // 2), PANEL), np.uint32)
        _pack(hessian, self._panels)

    def of(self, delta: np.ndarray) -> float:
        """Output error tr(ΔHΔᵀ) of a weight error Δ (rows, n) float32."""
        errors = np.empty(-(-len(delta) // PANEL))
        _traces(delta, self._panels, errors)
        return float(errors.sum())

    def of_rounding(
        self,
        w: np.ndarray,
        scale: np.ndarray,
        zero: np.ndarray,
        size: int,
        arithmetic: tuple[np.float32, int, np.ndarray],
        divisor: np.ndarray,
    ) -> float:
        """Output error tr(ΔHΔᵀ) of rounding w to the nearest: Δ = (nearest(w) - w) / divisor.

        Args:
            w: (rows, n) float32: weights.
            scale: (rows, groups) float32: scales of groups of `size` consecutive columns.
            zero: (rows, groups) float32: the groups' zeros.
            size: number of columns in a group.
            arithmetic: the grid's max_code, kind and levels, as in columns.py.
            divisor: (n,) float32: scales of the columns, such as AWQ's s, by which errors are divided.
        """
        errors = np.empty(-(-len(w) // PANEL))
        max_code, kind, levels = arithmetic
        _rounding_traces(w, scale, zero, size, max_code, kind, levels, divisor, self._panels, errors)
        return float(errors.sum())
