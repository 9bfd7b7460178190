"""Dense linear algebra of the solvers: damping, the inverse Cholesky factor and the output error tr(ΔHΔᵀ)."""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from gptq_awq.kernels import rank_k
from gptq_awq.kernels.quadratic import Quadratic

MAX_DAMPING = 1.0
DAMPING_STEP = 10.0
BLOCK = 384
"""Columns of a symmetric matrix that are multiplied at a time: wider blocks waste more work below the diagonal."""
LEAF = 192
"""Columns that a CPU factors by LAPACK, whose solve with the identity doesn't see its zeros; a GPU 2 BLOCK at once."""


class NotPositiveDefiniteError(Exception):
    """Raised when no damping up to `MAX_DAMPING` made the Hessian positive definite."""


def inverse_cholesky(
    hessian: Float[Tensor, "n n"], damping: float, order: Int[Tensor, "n"] | None = None
) -> tuple[Float[Tensor, "n n"], float]:
    """Upper Cholesky factor U of the damped inverse: UᵀU = (H + λ mean(diag H) I)⁻¹.

    Row i of U, divided by U_ii, is what GPTQ propagates after fixing column i (arXiv 2210.17323, eq. 4 and
    sec. 3.3 step 3). Where a factorization fails, damping λ is multiplied by ten until it succeeds. Takes n³ flops and,
    beside H, memory for U alone.

    Args:
        hessian: symmetric positive semi-definite, in the precision to compute in; zeros on its diagonal (columns that
            no token reaches) are replaced by one.
        damping: λ, as a fraction of the mean diagonal (percdamp).
        order: order of columns in U; None: their natural order.

    Returns:
        U, and the damping λ that was used.

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
    """Upper Cholesky factors of several damped inverses at once, as in `inverse_cholesky`, for one damping.

    A factor is None where the damping does not suffice.
    """
    n = len(hessians[0])
    factors = hessians[0].new_empty(len(hessians), n, n)
    for factor, hessian, order in zip(factors, hessians, orders, strict=True):
        backwards = (torch.arange(n, device=hessian.device) if order is None else order).flip(0)
        reordered(hessian, backwards, factor)
        factor.diagonal().copy_(_damped_diagonal(hessian, damping)[backwards])
    # A single matrix is not passed as a stack: its products are faster than batched ones.
    failed = _invert_factor(factors if len(factors) > 1 else factors[0])
    fine = (failed == 0) & torch.isfinite(factors.sum((1, 2)))
    return [_reversed(factor) if good else None for factor, good in zip(factors, fine.tolist(), strict=True)]


def damped(hessian: Float[Tensor, "n n"], damping: float) -> Float[Tensor, "n n"]:
    """H + λ mean(diag H) I as `inverse_cholesky` factors it, in memory of its own."""
    out = hessian.clone()
    out.diagonal().copy_(_damped_diagonal(hessian, damping))
    return out


def _damped_diagonal(hessian: Float[Tensor, "n n"], damping: float) -> Float[Tensor, "n"]:
    return _diagonal(hessian) + ridge(hessian, damping)


def ridge(hessian: Float[Tensor, "n n"], damping: float) -> Float[Tensor, ""]:
    """Number that damping adds to the Hessian's diagonal: λ mean(diag H)."""
    return damping * _diagonal(hessian).mean()


def _diagonal(hessian: Float[Tensor, "n n"]) -> Float[Tensor, "n"]:
    return torch.where(hessian.diagonal() == 0, 1.0, hessian.diagonal())


def reordered(
    matrix: Float[Tensor, "n n"], order: Int[Tensor, "n"], out: Float[Tensor, "n n"] | None = None
) -> Float[Tensor, "n n"]:
    """Permute rows and columns to `order`, into `out` if given, without another temporary of the matrix's size."""
    out = torch.empty_like(matrix) if out is None else out
    for a in range(0, len(order), BLOCK):
        out[a : a + BLOCK] = matrix[order[a : a + BLOCK]].index_select(1, order)
    return out


def _reversed(matrix: Float[Tensor, "n n"]) -> Float[Tensor, "n n"]:
    """Reverse the order of rows and columns, in place."""
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
    """Replace a by the inverse L⁻¹ of its lower Cholesky factor, L Lᵀ = a, recursively by halves.

    With a = J H J, J reversing the order, U = J L⁻¹ J. For [A ·; B C]: L₁₁⁻¹ of A; L₂₁ = B L₁₁⁻ᵀ; L₂₂⁻¹ of C - L₂₁L₂₁ᵀ;
    and -L₂₂⁻¹L₂₁L₁₁⁻¹ below. Nearly all work is in matmuls, in an order that lets results replace their inputs. Entries
    above the diagonal are never read.

    Returns:
        For each matrix, 0, or another number where it is not positive definite.
    """
    n = a.shape[-1]
    if n <= (LEAF if a.device.type == "cpu" else 2 * BLOCK):
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


def rough_form(hessian: Float[Tensor, "n n"]) -> Quadratic | None:
    """H for output errors in bfloat16, where its device multiplies that natively; else None.

    It is twice as fast as `quadratic` and within 0.3%, except for a Δ that was found by H, such as GPTQ's, whose terms
    cancel (9% off was seen).
    """
    native = hessian.device.type == "cpu" and rank_k.available()
    return Quadratic(hessian.float().numpy()) if native else None


def quadratic(delta: Float[Tensor, "out n"], hessian: Float[Tensor, "n n"]) -> float:
    """Output error tr(Δ H Δᵀ) of a weight error Δ: squared errors of outputs, summed.

    As H is symmetric, only its blocks on and above the diagonal are multiplied, the latter counted twice.
    """
    total, n = torch.zeros((), dtype=torch.float64, device=delta.device), len(hessian)
    for a in range(0, n, BLOCK):
        b = min(a + BLOCK, n)
        column = hessian[:b, a:b].clone()
        column[a:] /= 2  # the block on the diagonal counts once, after the factor 2 below
        total += 2 * (delta[:, :b] @ column).mul_(delta[:, a:b]).sum(1).double().sum()
    return float(total)  # once: a GPU has all blocks queued before it is waited for
