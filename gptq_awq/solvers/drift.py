"""Base of the solvers that correct drift (GPTAQ, Qronos): GPTQ's column sweep, started from a shifted weight.

Drift is the difference between a linear's input X in the full-precision model and X̃ in the quantized one.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from gptq_awq.numerics.linalg import reordered
from gptq_awq.runtime.options import Fraction, checked_dataclass
from gptq_awq.solvers.gptq import GPTQ


@checked_dataclass
class DriftCorrected(GPTQ):
    """GPTQ with its options and `strength`, the fraction of the drift to correct.

    Attributes:
        strength: fraction of the drift that is corrected, from 0 (GPTQ) to 1 (as in the paper).

    Raises:
        UserError: a strength outside of 0 to 1, or an option that GPTQ refuses.
    """

    strength: Fraction = 1.0
    needs_cross: bool = True

    def plain(self) -> GPTQ:
        """GPTQ with the same options: what this solver is on inputs of full precision, where nothing has drifted."""
        return GPTQ(self.act_order, self.static_groups, self.damping, self.block_size, fallback=self.fallback)


def to_rounding_order(square: Float[Tensor, "in in"], order: Int[Tensor, "in"] | None) -> Float[Tensor, "in in"]:
    """Permute rows and columns of an (in, in) matrix to the order in which columns are rounded; None: natural order."""
    return square if order is None else reordered(square, order)


def columns_to_rounding_order(W: Float[Tensor, "out in"], order: Int[Tensor, "in"] | None) -> Float[Tensor, "out in"]:
    """Permute a weight's columns from natural order to the order in which they are rounded."""
    return W if order is None else W.index_select(1, order)


def columns_to_natural_order(W: Float[Tensor, "out in"], order: Int[Tensor, "in"] | None) -> Float[Tensor, "out in"]:
    """Permute a weight's columns from rounding order back to natural order."""
    return W if order is None else W.index_select(1, torch.argsort(order))
