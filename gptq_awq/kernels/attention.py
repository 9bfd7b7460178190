"""Causal attention of bfloat16 on CPUs that have dpbf16ps (AVX512-BF16), for calibration's forwards.

In a small model, torch's kernel takes longer than the matmuls of all linears: its exponentials are slow, and in short
windows it multiplies above the diagonal too. Here PANEL queries of a head are computed at a time, side by side in
vector registers; scores and sums are float32, and probabilities are rounded to bfloat16 for the second product, as
torch does.

    Sᵀ = K Qᵀ      keys up to the panel's last query, a panel's queries beside each other
    Pᵀ = exp((Sᵀ - max) scale)  over the keys of each query
    O = P V / Σ P
"""

import numba
import numpy as np

from gptq_awq.kernels.compiled import compiled
from gptq_awq.kernels.rank_k import PANEL, ROWS, add_tile, bfloat16
from gptq_awq.kernels.softmax import exp

WIDTH = PANEL
"""PANEL as an argument of loops: LLVM unrolls loops over so small a constant before it has vectorized them."""


@numba.njit
def _pack_rows(x, panel, start):  # pragma: no cover (compiled)
    """Transpose PANEL rows of x (tokens, words), from `start` on, to panel (words, PANEL); zeros beyond the last."""
    panel[:] = np.uint32(0)
    for r in range(min(PANEL, len(x) - start)):
        for k in range(x.shape[1]):
            panel[k, r] = x[start + r, k]


@numba.njit
def _pack_columns(x, panels):  # pragma: no cover (compiled)
    """Lay out x (tokens, columns) uint16 in panels of columns (panels, token pairs, PANEL); zeros beyond the last."""
    tokens, columns = x.shape
    panels[:] = np.uint32(0)
    for p in range(len(panels)):
        first, count = p * PANEL, min(PANEL, columns - p * PANEL)
        for token in range(tokens):
            shift = np.uint32(16 * (token % 2))
            for j in range(count):
                panels[p, token // 2, j] |= np.uint32(x[token, first + j]) << shift


@numba.njit
def _probabilities(scores, words, sums, keys, start, scale, width):  # pragma: no cover (compiled)
    """Exponentiate a panel's scores (keys, PANEL), less each query's maximum, under the causal mask.

    words: (key pairs, PANEL) uint32, written: exponentials as pairs of bfloat16 numbers.
    sums: (PANEL,) float32, written: each query's sum of exponentials.
    """
    top = np.full(PANEL, np.float32(-np.inf))
    for j in range(start, keys):  # causal mask: keys after the query
        for r in range(min(j - start, width)):
            scores[j, r] = np.float32(-np.inf)
    for j in range(keys):
        for r in range(width):
            top[r] = scores[j, r] if scores[j, r] > top[r] else top[r]
    for r in range(width):
        sums[r] = np.float32(0.0)
    bits = scores.view(np.uint32)
    for j in range(keys):
        for r in range(width):
            p = exp((scores[j, r] - top[r]) * scale)
            scores[j, r] = p
            sums[r] += p
    for k in range((keys + 1) // 2):
        for r in range(width):
            high = bfloat16(bits[2 * k + 1, r]) if 2 * k + 1 < keys else np.uint32(0)
            words[k, r] = bfloat16(bits[2 * k, r]) | (high << np.uint32(16))


@compiled
def causal_attention(q, k, v, scale, width, out):  # pragma: no cover (compiled)
    """Causal attention softmax(scale · Q Kᵀ) V of every head.

    Args:
        q: (batch, heads, tokens, d/2) uint32: bfloat16 numbers, two in a word.
        k: (batch, kv heads, tokens, d/2) uint32: bfloat16 numbers, two in a word; kv heads divide q's heads.
        v: (batch, kv heads, tokens, d) uint16: bfloat16 bits.
        scale: float32 factor of the scores.
        width: WIDTH, as an argument (see there).
        out: (batch, tokens, heads, d) uint16, written: bfloat16 bits.
    """
    batch, heads, tokens, half = q.shape
    shared, d = heads // k.shape[1], v.shape[3]
    panels = (tokens + PANEL - 1) // PANEL
    for index in numba.prange(batch * heads):
        b, h = index // heads, index % heads
        keys_packed = np.empty((panels, half, PANEL), np.uint32)
        for p in range(panels):
            _pack_rows(k[b, h // shared], keys_packed[p], p * PANEL)
        values = np.empty(((d + PANEL - 1) // PANEL, (tokens + 1) // 2, PANEL), np.uint32)
        _pack_columns(v[b, h // shared], values)
        queries = np.empty((half, PANEL), np.uint32)
        scores = np.empty((panels * PANEL + 1, PANEL), np.float32)
        words, sums = np.empty((panels * PANEL // 2 + 1, PANEL), np.uint32), np.empty(PANEL, np.float32)
        mixed = np.empty((PANEL, PANEL), np.float32)
        bits = mixed.view(np.uint32)
        for p in range(panels):
            start, count = p * PANEL, min(PANEL, tokens - p * PANEL)
            keys = start + count
            _pack_rows(q[b, h], queries, start)
            scores[: keys + PANEL - count] = np.float32(0.0)
            for panel in range(p + 1):
                for r in range(0, PANEL, ROWS):
                    address = scores.ctypes.data + 4 * PANEL * (panel * PANEL + r)
                    left = keys_packed[panel].ctypes.data + 4 * r
                    add_tile(left, queries.ctypes.data, half, address, PANEL)  # pyright: ignore[reportCallIssue]
            _probabilities(scores, words, sums, keys, start, scale, width)
            for c in range(len(values)):
                columns = min(PANEL, d - c * PANEL)
                mixed[:] = np.float32(0.0)
                for r in range(0, columns, ROWS):  # rows of Oᵀ are columns of V
                    left, address = values[c].ctypes.data + 4 * r, mixed.ctypes.data + 4 * PANEL * r
                    pairs = (keys + 1) // 2
                    add_tile(left, words.ctypes.data, pairs, address, PANEL)  # pyright: ignore[reportCallIssue]
                for j in range(columns):
                    for r in range(count):
                        mixed[j, r] /= sums[r]
                        out[b, start + r, h, c * PANEL + j] = bfloat16(bits[j, r])
