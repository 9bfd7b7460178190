"""Dense linear algebra of the solvers: damping and the inverse Cholesky factor."""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from gptq_awq.kernels import rank_k
from gptq_awq.kernels.quadratic import Quadratic

MAX_DAMPING = 1.0
DAMPING_STEP = 10.0
BLOCK = 384
"""Columns of a symmetric matrix that are multiplied at a time: wider blocks waste more below the diagonal."""


class NotPositiveDefiniteError(Exception):
    """No damping up to `MAX_DAMPING` made the Hessian positive definite."""


def inverse_cholesky(
    hessian: Float[Tensor, "n n"], damping: float, order: Int[Tensor, "n"] | None = None
) -> tuple[Float[Tensor, "n n"], float]:
    """Upper Cholesky factor U of the damped inverse: UᵀU = (H + λ mean(diag H) I)⁻¹.

    Row i of U, divided by U_ii, is what GPTQ propagates after fixing column i (arXiv 2210.17323, eq. 4 and
    sec. 3.3 step 3). Where a factorization fails, damping λ is multiplied by ten until it succeeds. Takes n³ flops and,
    beside H, memory for U alone.

    Args:
        hessian: symmetric positive semi-definite, in the precision to compute in; where its diagonal is zero (a column
            that no token reaches), one is taken for it.
        damping: λ, as a fraction of the mean diagonal (percdamp).
        order: of columns, that U shall be in; None: as they are.

    Returns:
        U, and the damping that was used.

    Raises:
        NotPositiveDefiniteError: λ = 1 did not suffice (H is broken: non-finite or indefinite).
    """
    used = damping
    while True:
        (factor,) = inverse_choleskys([hessian], used, [order])
        if factor is not None:
            return factor, used
        if used >= MAX_DAMPING:
            raise NotPositiveDefiniteError(f"the Hessian is not positive definite even with damping {used:g}")
        used = min(max(used * DAMPING_STEP, 1e-3), MAX_DAMPING)


def inverse_choleskys(
    hessians: Sequence[Float[Tensor, "n n"]], damping: float, orders: Sequence[Int[Tensor, "n"] | None]
) -> list[Float[Tensor, "n n"] | None]:
    """`inverse_cholesky` of several matrices at once; None where that damping does not suffice."""
    n = len(hessians[0])
    factors = hessians[0].new_empty(len(hessians), n, n)
    for factor, hessian, order in zip(factors, hessians, orders, strict=True):
        backwards = (torch.arange(n, device=hessian.device) if order is None else order).flip(0)
        diagonal = torch.where(hessian.diagonal() == 0, 1.0, hessian.diagonal())
        reordered(hessian, backwards, factor)
        factor.diagonal().copy_(diagonal[backwards] + damping * diagonal.mean())
    # One by itself is no stack: the products of single matrices are faster.
    failed = _invert_factor(factors if len(factors) > 1 else factors[0])
    fine = (failed == 0) & torch.isfinite(factors.sum((1, 2)))
    return [_reversed(factor) if good else None for factor, good in zip(factors, fine.tolist(), strict=True)]


def reordered(
    matrix: Float[Tensor, "n n"], order: Int[Tensor, "n"], out: Float[Tensor, "n n"] | None = None
) -> Float[Tensor, "n n"]:
    """Rows and columns in that order, written to `out` if it is given; nothing else as large is made."""
    out = torch.empty_like(matrix) if out is None else out
    for a in range(0, len(order), BLOCK):
        out[a : a + BLOCK] = matrix[order[a : a + BLOCK]].index_select(1, order)
    return out


def _reversed(matrix: Float[Tensor, "n n"]) -> Float[Tensor, "n n"]:
    """Rows and columns from the last to the first, in place."""
    n = len(matrix)
    for a in range(0, n // 2, BLOCK):
        b = min(a + BLOCK, n // 2)
        first = matrix[a:b].flip(0, 1)
        matrix[a:b] = matrix[n - b : n - a].flip(0, 1)
        matrix[n - b : n - a] = first
    if n % 2:
        matrix[n // 2] = matrix[n // 2].flip(0)
    return matrix


def _invert_factor(a: Float[Tensor, "*stack n n"]) -> Int[Tensor, "*stack"]:
    """a ← L⁻¹ with L Lᵀ = a, in place, by halves; not 0 where a is not positive definite. H = J a J gives U = J L⁻¹ J.

    [A ·; B C]: L₁₁⁻¹ of A; L₂₁ = B L₁₁⁻ᵀ; L₂₂⁻¹ of C - L₂₁L₂₁ᵀ; and -L₂₂⁻¹L₂₁L₁₁⁻¹ below. Nearly all of it is matmuls,
    each in an order that lets results replace their inputs. What is above the diagonal is never read.
    """
    n = a.shape[-1]
    if n <= 2 * BLOCK:
        lower, failed = torch.linalg.cholesky_ex(a)
        a.copy_(torch.linalg.solve_triangular(lower, torch.eye(n, dtype=a.dtype, device=a.device), upper=False))
        return failed
    h = n // 2
    top, left, rest = a[..., :h, :h], a[..., h:, :h], a[..., h:, h:]
    failed = _invert_factor(top)
    for i in reversed(range(0, h, BLOCK)):
        j = min(i + BLOCK, h)
        left[..., i:j] = left[..., :j] @ top[..., i:j, :j].mT
    for i in range(0, n - h, BLOCK):
        rest[..., i:, i : i + BLOCK] -= left[..., i:, :] @ left[..., i : i + BLOCK, :].mT
    failed = failed + _invert_factor(rest)
    for i in range(0, h, BLOCK):
        left[..., i : i + BLOCK] = left[..., i:] @ top[..., i:, i : i + BLOCK]
    for i in reversed(range(0, n - h, BLOCK)):
        j = min(i + BLOCK, n - h)
        left[..., i:j, :] = -(rest[..., i:j, :j] @ left[..., :j, :])
    a[..., :h, h:] = 0
    return failed


def quadratic(delta: Float[Tensor, "out n"], hessian: Float[Tensor, "n n"], rough: bool = False) -> float:
    """tr(Δ H Δᵀ): the summed squared output error of a weight error Δ.

    H being symmetric, only its blocks on and above the diagonal are multiplied, the latter counted twice.

    Args:
        delta: Δ.
        hessian: H.
        rough: multiply in bfloat16 where the CPU does so natively: twice as fast and within 0.3%, but for a Δ that
            H was used to find, such as GPTQ's, whose terms cancel (9% off was seen).
    """
    if rough and delta.device.type == "cpu" and rank_k.available():
        return Quadratic(hessian.float().numpy()).of(delta.float().contiguous().numpy())
    total, n = 0.0, len(hessian)
    for a in range(0, n, BLOCK):
        b = min(a + BLOCK, n)
        column = hessian[:b, a:b].clone()
        column[a:] /= 2  # of what is counted twice, the block on the diagonal shall count once
        total += 2 * float((delta[:, :b] @ column).mul_(delta[:, a:b]).sum(1).double().sum())
    return total
