"""Arithmetic of codes: the three ways in which formats turn an integer code, a scale and a zero into a weight.

  affine    ŵ = s (c - z)     z an integer: INT2-8, ternary, llama.cpp's Q*_0, Q3_K, Q6_K
  minimum   ŵ = s c + z       z the smallest weight: MLX, llama.cpp's Q*_1, Q2_K, Q4_K, Q5_K
  table     ŵ = s t_c         t a table of levels: NF4, FP4

Rounding is to the nearest grid point. A group with scale 0 holds one value only.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

Params = tuple[Float[Tensor, "rows #cols"], Float[Tensor, "rows #cols"]]
"""Scale and zero: (rows, 1) for one group of columns, (rows, cols) where each column has its own."""

KINDS = ("affine", "minimum", "table")


@dataclass(frozen=True)
class Arithmetic:
    """Map between integer codes and weights, given a scale and a zero.

    Attributes:
        kind: one of the three ways in the module's docstring.
        max_code: largest code; the smallest is 0.
        levels: t by code, for tables; empty otherwise.
    """

    kind: Literal["affine", "minimum", "table"]
    max_code: int
    levels: tuple[float, ...] = ()

    def encode(self, w: Float[Tensor, "rows cols"], params: Params) -> Float[Tensor, "rows cols"]:
        """Codes of the grid points nearest to the weights (integers, in a float tensor)."""
        scale, zero = params
        if self.kind == "minimum":
            w = w - zero
        units = torch.where(scale == 0, 0.0, w / scale)
        if self.kind == "table":
            distance = (units[..., None] - units.new_tensor(self.levels)).abs()
            return distance.argmin(-1).to(w.dtype)
        codes = torch.round(units)
        return (codes if self.kind == "minimum" else codes + zero).clamp(0, self.max_code)

    def decode(self, codes: Float[Tensor, "rows cols"], params: Params) -> Float[Tensor, "rows cols"]:
        """Weights that the codes stand for."""
        scale, zero = params
        if self.kind == "affine":
            return scale * (codes - zero)
        if self.kind == "minimum":
            return scale * codes + zero
        return scale * codes.new_tensor(self.levels)[codes.long()]


def in_numbers(arithmetic: Arithmetic) -> tuple[np.float32, int, np.ndarray]:
    """Largest code, index of the kind and levels of an arithmetic, in the types that compiled kernels take."""
    levels = np.asarray(arithmetic.levels, np.float32)
    return np.float32(arithmetic.max_code), KINDS.index(arithmetic.kind), levels
