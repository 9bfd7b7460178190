"""Dense linear algebra of the solvers: damping and the inverse Cholesky factor."""

import torch
from jaxtyping import Float
from torch import Tensor

from gptq_awq.kernels import rank_k
from gptq_awq.kernels.quadratic import Quadratic

MAX_DAMPING = 1.0
DAMPING_STEP = 10.0
BLOCK = 384
"""Columns of a symmetric matrix that are multiplied at a time: wider blocks waste more below the diagonal."""
TRIANGLE = 96
"""Triangular matrices up to this size are inverted in one call."""


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
    """U = J L⁻¹ J, with J reversing the order of columns and L Lᵀ = J H J: the inverse of H is never formed."""
    damped = hessian.flip(0, 1)
    damped.diagonal().add_(shift)
    lower, failed = torch.linalg.cholesky_ex(damped)
    if failed.item():
        return None
    upper = _inverse_of_lower(lower, damped.zero_()).flip(0, 1)
    return upper if bool(torch.isfinite(upper.sum())) else None


def _inverse_of_lower(lower: Float[Tensor, "n n"], out: Float[Tensor, "n n"]) -> Float[Tensor, "n n"]:
    """Inverse of a lower triangular matrix into `out`, zeros before, half by half.

    [A 0; B C]⁻¹ = [A⁻¹ 0; -C⁻¹BA⁻¹ C⁻¹], in matmuls: n³/3 flops, a third of solving for the identity.
    """
    n = len(lower)
    if n <= TRIANGLE:
        identity = torch.eye(n, dtype=lower.dtype, device=lower.device)
        return out.copy_(torch.linalg.solve_triangular(lower, identity, upper=False))
    h = n // 2
    a = _inverse_of_lower(lower[:h, :h], out[:h, :h])
    c = _inverse_of_lower(lower[h:, h:], out[h:, h:])
    out[h:, :h] = -(c @ (lower[h:, :h] @ a))
    return out


def native_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the hardware multiplies it natively, else float32 (float16 on GPUs without bfloat16)."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    native = torch.cpu.get_capabilities()
    has_bf16 = device.type == "cpu" and (native.get("avx512_bf16") or native.get("amx_bf16"))
    return torch.bfloat16 if has_bf16 else torch.float32


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
