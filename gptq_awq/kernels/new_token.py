"""Attention of one new token per text to the keys and values before it, compiled for the CPU.

torch multiplies batches of bfloat16 matrices only where they lie without gaps, so that it first copies all keys and
values of a cache that has room for tokens to come: more work than attention itself, and buffers that grow with every
token leave holes in memory. Here keys and values are read where they are, each once for all the queries that share it,
number by number in the loop: a call of `read` for so short a row takes half as long again.
"""

import numba
import numpy as np

from gptq_awq.kernels.compiled import compiled
from gptq_awq.kernels.numbers import number, read, write
from gptq_awq.kernels.softmax import exp


@numba.njit(fastmath={"reassoc", "contract"})
def _add_products(queries, k, start, step, half, scale, row, scores):  # pragma: no cover (compiled)
    """Add scale · q · k to the scores (queries, tokens) of one head; keys begin at `start`, `step` numbers apart."""
    shared, d = queries.shape
    for t in range(scores.shape[1]):
        key = k[start + t * step : start + t * step + d]
        for j in range(d):
            row[j] = number(key[j], half)
        for g in range(shared):
            total = np.float32(0.0)
            for j in range(d):
                total += queries[g, j] * row[j]
            scores[g, t] += total * scale


@numba.njit(fastmath={"contract"})
def _add_values(weights, v, start, step, half, row, mixed):  # pragma: no cover (compiled)
    """Add the weighted sum of a head's values to mixed (queries, e); they begin at `start`, `step` numbers apart."""
    shared, e = mixed.shape
    for t in range(weights.shape[1]):
        value = v[start + t * step : start + t * step + e]
        for j in range(e):
            row[j] = number(value[j], half)
        for g in range(shared):
            weight = weights[g, t]
            for j in range(e):
                mixed[g, j] += weight * row[j]


@numba.njit
def _exponentials(scores):  # pragma: no cover (compiled)
    """Replace scores (tokens,) by exp(score - largest), and return their sum; NaN where all are -inf."""
    top, total = np.float32(-np.inf), 0.0
    for j in range(len(scores)):
        top = scores[j] if scores[j] > top else top
    for j in range(len(scores)):
        scores[j] = exp(scores[j] - top)
    for j in range(len(scores)):
        total += scores[j]
    return np.float32(total)


@compiled
def new_token_attention(q, k, at_k, v, at_v, half, scale, added, out):  # pragma: no cover (compiled)
    """Attention softmax(scale · q Kᵀ + added) V of one query per head; sums are float32.

    Args:
        q: (batch, kv heads, queries of each, d) float32, or bits of bfloat16 as uint16.
        k: the memory of keys (batch, kv heads, tokens, d), of the same type.
        at_k: strides of the keys' first three dimensions in it, in numbers; the fourth's is 1.
        v, at_v: values (batch, kv heads, tokens, e) likewise.
        half: whether the type is bfloat16.
        scale: float32 factor of the scores.
        added: (batch, kv heads, queries of each, tokens) float32, added to the scores: -inf where a key isn't seen.
        out: (batch, kv heads, queries of each, e) of the same type, written.
    """
    batch, kv, shared, e = out.shape
    d = q.shape[3]
    for index in numba.prange(batch * kv):
        b, h = index // kv, index % kv
        queries, row = np.empty((shared, d), np.float32), np.empty(max(d, e), np.float32)
        for g in range(shared):
            read(q[b, h, g], half, queries[g])
        scores, mixed = added[b, h].copy(), np.zeros((shared, e), np.float32)
        _add_products(queries, k, b * at_k[0] + h * at_k[1], at_k[2], half, scale, row, scores)
        for g in range(shared):
            scores[g] /= _exponentials(scores[g])
        _add_values(scores, v, b * at_v[0] + h * at_v[1], at_v[2], half, row, mixed)
        for g in range(shared):
            write(mixed[g], half, out[b, h, g])
