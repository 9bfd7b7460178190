"""Dense linear algebra of the solvers: damping and the inverse Cholesky factor."""

import torch
from jaxtyping import Float
from torch import Tensor

MAX_DAMPING = 1.0
DAMPING_STEP = 10.0


class NotPositiveDefiniteError(Exception):
    """No damping up to `MAX_DAMPING` made the Hessian positive definite."""


def inverse_cholesky(hessian: Float[Tensor, "n n"], damping: float) -> tuple[Float[Tensor, "n n"], float]:
    """Upper Cholesky factor U of the damped inverse: UᵀU = (H + λ mean(diag H) I)⁻¹.

    Row i of U, divided by U_ii, is what GPTQ propagates after fixing column i (arXiv 2210.17323, eq. 4 and
    sec. 3.3 step 3). Where a factorization fails, damping λ is multiplied by ten until it succeeds.

    Args:
        hessian: symmetric positive semi-definite, in the precision to compute in.
        damping: λ, as a fraction of the mean diagonal (percdamp).

    Returns:
        U, and the damping that was used.

    Raises:
        NotPositiveDefiniteError: λ = 1 did not suffice (H is broken: non-finite or indefinite).
    """
    mean_diagonal = hessian.diagonal().mean()
    used = damping
    while True:
        factor = _try_inverse_cholesky(hessian, used * mean_diagonal)
        if factor is not None:
            return factor, used
        if used >= MAX_DAMPING:
            raise NotPositiveDefiniteError(f"the Hessian is not positive definite even with damping {used:g}")
        used = min(max(used * DAMPING_STEP, 1e-3), MAX_DAMPING)


def _try_inverse_cholesky(hessian: Tensor, shift: Tensor) -> Tensor | None:
    """U = J L⁻¹ J, with J reversing the order of columns and L Lᵀ = J H J: the inverse is never formed."""
    damped = hessian.flip(0, 1)
    damped.diagonal().add_(shift)
    lower, failed = torch.linalg.cholesky_ex(damped)
    if failed.item():
        return None
    identity = torch.eye(len(lower), dtype=lower.dtype, device=lower.device)
    upper = torch.linalg.solve_triangular(lower, identity, upper=False).flip(0, 1)
    return upper if bool(torch.isfinite(upper).all()) else None


def quadratic(delta: Float[Tensor, "out n"], hessian: Float[Tensor, "n n"]) -> float:
    """tr(Δ H Δᵀ): the summed squared output error of a weight error Δ."""
    return float(((delta @ hessian) * delta).sum(dtype=torch.float64))
