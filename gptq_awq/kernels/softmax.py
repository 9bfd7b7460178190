"""Log-sum-exp, KL and argmax of logits in one pass over a tile of the vocabulary, compiled for the CPU.

In torch, log_softmax of two models, their difference, its product with p and two argmaxes read and write the logits a
dozen times, which costs as much as computing them. Here each row of a tile is read twice, the second time from cache,
and only a few sums per token are written, which accumulate over tiles.

Sums run over a block of columns in float32, in vector registers, and over blocks in float64: losses and KL agree with
float64 arithmetic on the same logits to about 1e-6.
"""

import math

import numba
import numpy as np

from gptq_awq.kernels.compiled import compiled

LOG2_E = np.float32(1.4426950408889634)
# log 2 in two parts: the first has few enough bits that its product with an exponent is exact.
LN2_HIGH, LN2_LOW = np.float32(0.693359375), np.float32(-2.12194440e-4)
SMALLEST = np.float32(-87.0)
"""Least argument of exp whose result is not set to 0: near the end of float32's normal numbers."""
COEFFICIENTS = tuple(np.float32(1 / math.factorial(k)) for k in range(8))
C0, C1, C2, C3, C4, C5, C6, C7 = COEFFICIENTS
BLOCK = 256
"""Number of columns whose maximum, or sum, is computed at once."""
EXPONENT_BIAS, MANTISSA_BITS = 127, 23


@numba.njit(fastmath={"contract"})
def exp(x):  # pragma: no cover (compiled)
    """Exponential of a float32 x <= 0, to a relative error of 1.5e-7; 0 below -87, NaN for NaN.

    x = n log 2 + r with |r| <= 0.35, exp(r) by its Taylor polynomial of degree 7 (remainder below 6e-9), 2^n by its
    bits. It has no branch and no call, so that a loop of it becomes vector instructions; numba has no vectorized exp
    without Intel's library.
    """
    # Bounded and not NaN, so that it has an integer; r is computed from x itself and keeps the NaN.
    bounded = x if x > SMALLEST else SMALLEST
    n = np.int32(bounded * LOG2_E - np.float32(0.5))
    r = x - np.float32(n) * LN2_HIGH
    r = r - np.float32(n) * LN2_LOW
    p = C7
    p = p * r + C6
    p = p * r + C5
    p = p * r + C4
    p = p * r + C3
    p = p * r + C2
    p = p * r + C1
    p = p * r + C0
    power = np.int32((n + np.int32(EXPONENT_BIAS)) << np.int32(MANTISSA_BITS)).view(np.float32)
    return np.float32(0.0) if x < SMALLEST else p * power


@numba.njit
def ordered(bits):  # pragma: no cover (compiled)
    """Map a float32's bits to an int32 of the same order, and back: the order of negative numbers is reversed.

    Maxima of integers become vector instructions, those of floats, because of NaN, don't. Types stay 32 bits wide.
    """
    return np.int32(bits ^ np.int32(np.int32(bits >> np.int32(31)) & np.int32(0x7FFFFFFF)))


@numba.njit
def most(bits):  # pragma: no cover (compiled)
    """Maximum of a few float32 numbers, given as their bits; a positive NaN is larger than all."""
    top = ordered(bits[0])
    for j in range(1, len(bits)):
        i = ordered(bits[j])
        top = i if i > top else top
    return np.int32(ordered(top)).view(np.float32)


@numba.njit
def largest(bits, values):  # pragma: no cover (compiled)
    """Maximum of a row and the first index at which it occurs; `bits`: the same memory as int32.

    A NaN may be returned as the maximum or be ignored; sums of exponentials do not ignore it.
    """
    top, block = np.float32(-np.inf), 0
    for start in range(0, len(bits), BLOCK):
        found = most(bits[start : start + BLOCK])
        if found > top:
            top, block = found, start
        elif found != found:
            return found, 0
    for j in range(block, min(block + BLOCK, len(bits))):
        if values[j] == top:
            return top, j
    return top, 0


@numba.njit(fastmath={"reassoc", "nsz"})
def total_of(values):  # pragma: no cover (compiled)
    """Sum of a few float32 numbers, in any order."""
    total = np.float32(0.0)
    for j in range(len(values)):
        total += values[j]
    return total


@numba.njit
def exp_sum(x, shift):  # pragma: no cover (compiled)
    """Sum Σ exp(x - shift). A block's terms are stored first, so that the compiler may reorder only their sum."""
    terms, total = np.empty(BLOCK, np.float32), 0.0
    for start in range(0, len(x), BLOCK):
        part = x[start : start + BLOCK]
        for j in range(len(part)):
            terms[j] = exp(part[j] - shift)
        total += total_of(terms[: len(part)])
    return total


@numba.njit
def exp_sums(p, q, p_shift, q_shift):  # pragma: no cover (compiled)
    """Sums Σ a, Σ b and Σ a (x - y), where x = p - p_shift, y = q - q_shift, a = exp(x) and b = exp(y)."""
    a, b, c = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32)
    p_total, q_total, crossed = 0.0, 0.0, 0.0
    for start in range(0, len(p), BLOCK):
        p_part, q_part = p[start : start + BLOCK], q[start : start + BLOCK]
        n = len(p_part)
        for j in range(n):
            x, y = p_part[j] - p_shift, q_part[j] - q_shift
            weight = exp(x)
            a[j], b[j] = weight, exp(y)
            # 0 log 0 = 0, also where both logits are -inf.
            c[j] = weight * (x - y) if weight != np.float32(0.0) else np.float32(0.0)
        p_total += total_of(a[:n])
        q_total += total_of(b[:n])
        crossed += total_of(c[:n])
    return p_total, q_total, crossed


@numba.njit
def moved(total, shift, top):  # pragma: no cover (compiled)
    """New shift of a running log-sum-exp: the largest logit so far; any number where all are -inf."""
    if total == 0.0:
        return np.float32(0.0) if top == -np.inf else top
    return top if not top <= shift else shift


@numba.njit
def rescaled(total, before, after):  # pragma: no cover (compiled)
    """Convert a sum of exp(x - before) into the sum of exp(x - after)."""
    return total if total == 0.0 or before == after else total * math.exp(np.float64(before) - np.float64(after))


@compiled
def add_tile(x, bits, first, shift, total, best):  # pragma: no cover (compiled)
    """Add a tile of logits to each token's running log-sum-exp, shift + log(total), and argmax.

    Args:
        x: (tokens, words) float32: the tile's logits; `bits`: the same memory as int32.
        first: index in the vocabulary of the tile's first word.
        shift, total: (tokens,) float32 and float64, changed; zeros before the first tile.
        best: (tokens,) int64, changed: argmax so far, the first on a tie.
    """
    for t in numba.prange(len(x)):
        top, where = largest(bits[t], x[t])
        if total[t] == 0.0 or top > shift[t]:
            best[t] = first + where
        after = moved(total[t], shift[t], top)
        total[t] = rescaled(total[t], shift[t], after) + exp_sum(x[t], after)
        shift[t] = after


@compiled
def add_tiles(  # pragma: no cover (compiled)
    p, p_bits, p_shift, p_total, p_best, q, q_bits, q_shift, q_total, q_best, first, crossed
):
    """Add a tile of two models' logits p and q to their running log-sum-exps, argmaxes and KL divergence.

    KL(p ‖ q) = crossed / p_total - log p_total + log q_total: exactly 0 for equal logits.

    Args:
        p, p_bits, p_shift, p_total, p_best: the first model's tile and running values, as in `add_tile`.
        q, q_bits, q_shift, q_total, q_best: those of the second model.
        first: index in the vocabulary of the tile's first word.
        crossed: (tokens,) float64, changed: Σ exp(p - p_shift) ((p - p_shift) - (q - q_shift)).
    """
    for t in numba.prange(len(p)):
        p_top, p_where = largest(p_bits[t], p[t])
        q_top, q_where = largest(q_bits[t], q[t])
        if p_total[t] == 0.0 or p_top > p_shift[t]:
            p_best[t] = first + p_where
        if q_total[t] == 0.0 or q_top > q_shift[t]:
            q_best[t] = first + q_where
        p_after, q_after = moved(p_total[t], p_shift[t], p_top), moved(q_total[t], q_shift[t], q_top)
        if p_total[t] != 0.0:  # move the sum so far to the new shifts: the differences of logits, then their weights
            by = (np.float64(p_shift[t]) - p_after) - (np.float64(q_shift[t]) - q_after)
            crossed[t] = rescaled(crossed[t] + by * p_total[t], p_shift[t], p_after)
        p_sum, q_sum, both = exp_sums(p[t], q[t], p_after, q_after)
        p_total[t] = rescaled(p_total[t], p_shift[t], p_after) + p_sum
        q_total[t] = rescaled(q_total[t], q_shift[t], q_after) + q_sum
        crossed[t] += both
        p_shift[t], q_shift[t] = p_after, q_after
