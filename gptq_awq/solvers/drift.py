"""What solvers share that make up for drift: GPTQ's sweep from a shifted weight, and how much of the shift is taken."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from gptq_awq.errors import UserError
from gptq_awq.solvers.gptq import GPTQ


@dataclass(frozen=True)
class DriftCorrected(GPTQ):
    """GPTQ with options as its own, and one.

    Attributes:
        strength: how much of the drift is made up for, 0 (GPTQ) to 1 (the paper).

    Raises:
        UserError: a strength that is no fraction, and what GPTQ refuses.
    """

    strength: float = 1.0
    needs_cross: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.strength <= 1:
            raise UserError(f"method.solver.strength={self.strength}: give a fraction from 0 (as gptq) to 1")


def in_order(square: Float[Tensor, "in in"], order: Int[Tensor, "in"] | None) -> Float[Tensor, "in in"]:
    """Rows and columns in the order that columns are rounded in."""
    return square if order is None else square.index_select(0, order).index_select(1, order)


def columns_in(W: Float[Tensor, "out in"], order: Int[Tensor, "in"] | None) -> Float[Tensor, "out in"]:
    """Columns in the order that they are rounded in."""
    return W if order is None else W.index_select(1, order)


def columns_back(W: Float[Tensor, "out in"], order: Int[Tensor, "in"] | None) -> Float[Tensor, "out in"]:
    """The inverse of `columns_in`."""
    return W if order is None else W.index_select(1, torch.argsort(order))
