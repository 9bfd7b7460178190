"""Qronos (Zhang et al., arXiv 2505.11695): correct the error of the layers before, then round by GPTQ's feedback.

For inputs X̃ of the quantized model and X of full precision, min ‖W X - Ŵ X̃‖² column by column: round the next column
to where it corrects the error best while the later ones stay, then choose the later ones anew by least squares. The
paper proves (thm. 3.1) that only the first column takes its correction; after it, least squares has absorbed all of
the drift and the rest is GPTQ's recursion. With G = X̃ Xᵀ, H = X̃ X̃ᵀ, columns numbered in the order of rounding:

    q_1   = quant( (W G_:,1ᵀ - Σ_{j>1} W_:,j H_j1) / H_11 )                        (eq. 6)
    W_>1 ← argmin over V of ‖W X - q_1 X̃_1 - V X̃_>1‖²                             (eq. 7)
    then GPTQ's columns 2…in, with the Cholesky factor of (H_>1)⁻¹

The least-squares solution for all columns is W* = W Gᵀ H⁻¹ = W + W D H⁻¹, D = (X - X̃) X̃ᵀ, and GPTQ's
recursion, started from W*, gives eq. 7 once column 1 is q_1, whatever q_1 is. So Qronos is GPTQ started from W*, except
that the first column is rounded at w_1 + (W D)_1 / H_11 (eq. 6) and the later columns absorb its distance from W* as
GPTQ's update does. Both are one shift of W, and the sweep is GPTQ's own.

Damping adds λI to both H and G, which keeps W* near W in directions where X̃ has little energy. The paper's λ is 1e-6
of H's largest eigenvalue; here it is `damping`, as in GPTQ. Where X = X̃, W* = W and Qronos is GPTQ.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from gptq_awq.calibration.moments import Moments
from gptq_awq.solvers.drift import DriftCorrected, columns_to_natural_order, columns_to_rounding_order


@dataclass(frozen=True)
class Qronos(DriftCorrected):
    """Qronos: least squares corrects the drift, GPTQ's feedback the rounding.

    With `strength` below 1 the output to match is W X̃ + strength · W (X - X̃) instead of W X.
    """

    name: str = "qronos"

    def target(
        self,
        W: Float[Tensor, "out in"],
        moments: Moments,
        U: Float[Tensor, "in in"],
        order: Int[Tensor, "in"] | None,
    ) -> Float[Tensor, "out in"]:
        """Weight that the sweep starts from: W*, its first column moved to where eq. 6 rounds it, later ones adjusted.

        Raises:
            ValueError: the moments lack `cross`.
        """
        first = 0 if order is None else int(order[0])
        residual = self.strength * (W @ moments.drift())
        shift = (columns_to_rounding_order(residual, order) @ U.T) @ U
        # Column 1 is rounded at w_1 + residual_1 / H_11; the others absorb its distance from W* as if it were an error.
        corrected = residual[:, first] / moments.hessian[first, first].clamp(min=torch.finfo(U.dtype).tiny)
        shift -= ((shift[:, 0] - corrected) / U[0, 0])[:, None] * U[0]
        return torch.where(moments.dead(), W, W + columns_to_natural_order(shift, order))
