"""Hadamard matrices: entries ±1, orthogonal rows, so H Hᵀ = n I. Rotation by H/√n spreads every outlier evenly.

    Sylvester   1, 2, 4, 8, …       H₂ₙ = [H H; H -H]
    Paley I     q + 1,  q ≡ 3 (4)   I + S,  S skew-symmetric: Legendre symbols χ(i - j) mod q, bordered by ones
    Paley II    2(q + 1), q ≡ 1 (4) S ⊗ [1 1; 1 -1] + I ⊗ [1 -1; -1 -1],  S symmetric

with q prime, and Kronecker products of any of these with a power of two. That covers all common widths of language
models: 576 = 36 · 16, 768 = 12 · 64, 3584 = 28 · 128, 11008 = 5504 · 2.
"""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor


def hadamard(n: int) -> Float[Tensor, "n n"]:
    """A Hadamard matrix of order n, float32. Raises ValueError where these constructions give none."""
    core = _core(n)
    if core is None:
        raise ValueError(f"no Hadamard matrix of order {n} by Sylvester's and Paley's constructions")
    sylvester = torch.ones(1, 1)
    for _ in range(int(math.log2(n // core))):
        sylvester = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]), sylvester)
    return torch.kron(_paley(core), sylvester)


def largest_order(n: int) -> int:
    """Largest divisor of n that is the order of a Hadamard matrix by these constructions; n itself for most widths."""
    return max(d for d in range(1, n + 1) if n % d == 0 and _core(d) is not None)


def times_hadamard(x: Float[Tensor, "*rows n"]) -> Float[Tensor, "*rows n"]:
    """Rotate rows by a Hadamard matrix: x H / √n, in O(n log n) per row for n = m 2ᵏ with small m.

    Where n has no Hadamard matrix: x (I ⊗ H) / √m with H of the `largest_order` m that divides n.
    """
    order = largest_order(x.shape[-1])
    core = _core(order)
    assert core is not None
    parts = x.reshape(-1, core, order // core)
    if core > 1:
        parts = torch.einsum("bij,ik->bkj", parts, _paley(core).to(x))
    half = 1
    while half < order // core:  # Sylvester's butterflies
        a, b = parts.reshape(-1, 2, half).unbind(1)
        parts = torch.stack((a + b, a - b), 1)
        half *= 2
    return parts.reshape(x.shape) / math.sqrt(order)


def _core(n: int) -> int | None:
    """Least m with n = m 2ᵏ that is 1 or one of Paley's orders; None where there is none."""
    odd = n // (n & -n)
    orders = (odd * 2**k for k in range((n & -n).bit_length()))
    return next((m for m in orders if m == 1 or _paley_prime(m)), None)


def _paley_prime(m: int) -> int | None:
    """Prime q of Paley's construction of order m: m - 1 (I) or m/2 - 1 (II); None where neither applies."""
    if m % 4:
        return None
    if _is_prime(m - 1):  # m is a multiple of 4, so this is 3 mod 4
        return m - 1
    q = m // 2 - 1
    return q if q % 4 == 1 and _is_prime(q) else None


def _paley(m: int) -> Float[Tensor, "m m"]:
    """Paley's Hadamard matrix of order m, float32; [1] for m = 1."""
    if m == 1:
        return torch.ones(1, 1)
    q = _paley_prime(m)
    assert q is not None
    skew = q % 4 == 3
    bordered = torch.zeros(q + 1, q + 1)
    bordered[0, 1:] = 1
    bordered[1:, 0] = -1 if skew else 1
    bordered[1:, 1:] = _legendre(torch.arange(q)[:, None] - torch.arange(q), q)
    if skew:
        return torch.eye(m) + bordered
    ones, turned = torch.tensor([[1.0, 1.0], [1.0, -1.0]]), torch.tensor([[1.0, -1.0], [-1.0, -1.0]])
    return torch.kron(bordered, ones) + torch.kron(torch.eye(q + 1), turned)


def _legendre(a: Int[Tensor, "..."], q: int) -> Float[Tensor, "..."]:
    """Legendre symbols χ(a): 0 for multiples of q, 1 for squares mod q, else -1."""
    symbol = torch.full((q,), -1.0)
    symbol[torch.arange(q) ** 2 % q] = 1
    symbol[0] = 0
    return symbol[a % q]


def _is_prime(n: int) -> bool:
    return n > 1 and all(n % d for d in range(2, math.isqrt(n) + 1))
