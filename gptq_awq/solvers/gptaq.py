"""GPTAQ (Li et al., arXiv 2504.02692): GPTQ that also corrects the error of the layers before.

The layer's input is X̃ in the quantized model and X in full precision; its output should be W X all the same:

    min ‖W X - Ŵ X̃‖² = ‖W (X - X̃) - (Ŵ - W) X̃‖²              asymmetric calibration (eq. 4)

The residual W (X - X̃) is a sum over input neurons q, and the part of neuron q goes to the columns after q when its
turn comes, beside GPTQ's update (sec. 4.2). With U the factor that GPTQ uses, UᵀU = H⁻¹, and D = (X - X̃) X̃ᵀ:

    P = ((D Uᵀ) ⊙ M) U,    M strictly upper triangular           (eq. 17)
    W_:,j ← W_:,j - e_q U_qj + w_q P_qj    for j > q              (alg. 1)

The residual is defined by the layer's original weight, so w_q is a column of W, and all second terms are known before
rounding begins: they add up to W P. GPTAQ is GPTQ started from W + W P, by the same sweep. The authors' code takes w_q
from the updated weight instead, which differs by P times a rounding error, and multiplies P by 0.25: `strength`.
Without the mask, W + W P is W + W D H⁻¹, the least-squares solution, which qronos.py rounds.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from gptq_awq.calibration.moments import Moments
from gptq_awq.solvers.drift import (
    DriftCorrected,
    columns_to_natural_order,
    columns_to_rounding_order,
    to_rounding_order,
)


@dataclass(frozen=True)
class GPTAQ(DriftCorrected):
    """GPTAQ: GPTQ with asymmetric calibration; `strength` is the fraction of the residual that is corrected."""

    name: str = "gptaq"

    def target(
        self,
        W: Float[Tensor, "out in"],
        moments: Moments,
        U: Float[Tensor, "in in"],
        order: Int[Tensor, "in"] | None,
    ) -> Float[Tensor, "out in"]:
        """Weight that the sweep starts from: W + strength · W P; columns whose input is always zero stay as they are.

        Such a column is not rounded, so nothing of its residual is due before its turn: all others share it, as least
        squares would have it, and its row of P has no mask.

        Raises:
            ValueError: the moments lack `cross`.
        """
        dead = moments.dead() if order is None else moments.dead()[order]

        def masked() -> Float[Tensor, "in in"]:
            half = to_rounding_order(moments.drift(), order) @ U.T
            unmasked = half[dead]
            half.triu_(1)[dead] = unmasked
            return half

        half = moments.once(("gptaq", self.damping, self.act_order), masked)
        shift = (columns_to_rounding_order(W, order) @ half) @ U
        return torch.where(moments.dead(), W, W + self.strength * columns_to_natural_order(shift, order))
