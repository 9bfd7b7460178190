"""KL of two models' predictions and its gradient in one pass over each token's logits, compiled for the CPU.

In torch two log_softmaxes, an exponential, a product and a difference read and write the logits a dozen times. Here a
token's logits are read once, bfloat16 or float32, and all that follows stays in cache.
"""

import math

import numba
import numpy as np

from gptq_awq.kernels.compiled import compiled
from gptq_awq.kernels.numbers import read, write
from gptq_awq.kernels.softmax import BLOCK, exp, most, total_of


@numba.njit
def _exponentials(x, shift, out):  # pragma: no cover (compiled)
    """Write exp(x - shift), and return the sum."""
    total = 0.0
    for start in range(0, len(x), BLOCK):
        part, written = x[start : start + BLOCK], out[start : start + BLOCK]
        for j in range(len(part)):
            written[j] = exp(part[j] - shift)
        total += total_of(written)
    return total


@compiled
def divergence_and_gradient(own, full, half, kl, gradient):  # pragma: no cover (compiled)
    """Write each token's KL(p ‖ q) and its gradient q - p in q's logits.

    Args:
        own: (tokens, words) float32, or bits of bfloat16 as uint16: logits of q, the student.
        full: (tokens, words) of the same type: logits of p, the full-precision model.
        half: whether the type is bfloat16.
        kl: (tokens,) float64, written.
        gradient: (tokens, words) of the same type, written.
    """
    tokens, words = own.shape
    for t in numba.prange(tokens):
        q, p = np.empty(words, np.float32), np.empty(words, np.float32)
        b, a = np.empty(words, np.float32), np.empty(words, np.float32)
        read(own[t], half, q)
        read(full[t], half, p)
        q_top, p_top = most(q.view(np.int32)), most(p.view(np.int32))
        q_total, p_total = _exponentials(q, q_top, b), _exponentials(p, p_top, a)
        q_part, p_part = np.float32(1.0 / q_total), np.float32(1.0 / p_total)
        crossed = 0.0
        for start in range(0, words, BLOCK):
            stop = min(start + BLOCK, words)
            for j in range(start, stop):
                weight = a[j]
                # 0 log 0 = 0, also where both logits are -inf.
                further = weight * ((p[j] - p_top) - (q[j] - q_top)) if weight != np.float32(0.0) else np.float32(0.0)
                b[j] = b[j] * q_part - weight * p_part
                p[j] = further
            crossed += total_of(p[start:stop])
        write(b, half, gradient[t])
        kl[t] = crossed / p_total - math.log(p_total) + math.log(q_total)
