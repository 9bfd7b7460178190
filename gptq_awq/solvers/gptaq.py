"""GPTAQ (Li et al., arXiv 2504.02692): GPTQ that also makes up for what the layers before have lost.

The layer is given X̃ by the quantized model where full precision gives it X, and shall answer W X all the same:

    min ‖W X - Ŵ X̃‖² = ‖W (X - X̃) - (Ŵ - W) X̃‖²              asymmetric calibration (eq. 4)

The residual W (X - X̃) is a sum over input neurons q, and the part of neuron q goes to the columns after q when its
turn comes, beside GPTQ's update (sec. 4.2). With U the factor that GPTQ uses, UᵀU = H⁻¹, and D = (X - X̃) X̃ᵀ:

    P = ((D Uᵀ) ⊙ M) U,    M strictly upper triangular           (eq. 17)
    W_:,j ← W_:,j - e_q U_qj + w_q P_qj    for j > q              (alg. 1)

The residual is of the layer's own weight, so w_q is its, and all second terms are known before rounding begins: they
add up to W P. GPTAQ is GPTQ from W + W P, by the same sweep. The authors' code takes for w_q the weight as updates
left it, which differs by P times a rounding error, and multiplies P by 0.25: `strength`. Without the mask W + W D H⁻¹
remains, the least squares answer; qronos.py rounds that.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from gptq_awq.calibration.moments import Moments
from gptq_awq.solvers.drift import DriftCorrected, columns_back, columns_in, in_order


@dataclass(frozen=True)
class GPTAQ(DriftCorrected):
    """GPTQ with asymmetric calibration; `strength` is of the residual that is made up for."""

    name: str = "gptaq"

    def target(
        self,
        W: Float[Tensor, "out in"],
        moments: Moments,
        U: Float[Tensor, "in in"],
        order: Int[Tensor, "in"] | None,
    ) -> Float[Tensor, "out in"]:
        """W + strength · W P.

        Raises:
            ValueError: moments have no `cross`.
        """
        half = moments.once(
            ("gptaq", self.damping, self.act_order), lambda: (in_order(moments.drift(), order) @ U.T).triu_(1)
        )
        shift = (columns_in(W, order) @ half) @ U
        return torch.where(moments.dead(), W, W + self.strength * columns_back(shift, order))
