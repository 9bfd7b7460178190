"""Arithmetic of codes: the four ways in which formats turn an integer code, a scale and a zero into a weight.

  affine    ŵ = s (c - z)     z an integer: INT2-8, ternary, llama.cpp's Q*_0, Q3_K, Q6_K
  minimum   ŵ = s c + z       z the smallest weight: MLX, llama.cpp's Q*_1, Q2_K, Q4_K, Q5_K
  table     ŵ = s t_c         t a table of levels: NF4, IQ4_NL
  float     ŵ = s f(c)        f(c) the small floating-point number of that code (floats.py): NVFP4, MXFP4, FP8

Rounding is to the nearest grid point. A group with scale 0 holds one value only.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from gptq_awq.grids.floats import FloatType, decode_float, encode_float

Params = tuple[Float[Tensor, "rows #cols"], Float[Tensor, "rows #cols"]]
"""Scale and zero: (rows, 1) for one group of columns, (rows, cols) where each column has its own."""

KINDS = ("affine", "minimum", "table", "float")


@dataclass(frozen=True)
class Arithmetic:
    """Map between integer codes and weights, given a scale and a zero.

    Attributes:
        kind: one of the four ways in the module's docstring.
        max_code: largest code; the smallest is 0.
        levels: t by code, for tables; bits of mantissa, smallest normal exponent and largest number, for floats;
            empty otherwise.
    """

    kind: Literal["affine", "minimum", "table", "float"]
    max_code: int
    levels: tuple[float, ...] = ()

    @classmethod
    def of_float(cls, kind: FloatType) -> "Arithmetic":
        """Arithmetic of a small floating-point type."""
        return cls("float", 2**kind.bits - 1, (float(kind.mantissa), float(kind.least), kind.largest))

    def encode(self, w: Float[Tensor, "rows cols"], params: Params) -> Float[Tensor, "rows cols"]:
        """Codes of the grid points nearest to the weights (integers, in a float tensor)."""
        scale, zero = params
        if self.kind == "minimum":
            w = w - zero
        units = torch.where(scale == 0, 0.0, w / scale)
        if self.kind == "table":
            distance = (units[..., None] - units.new_tensor(self.levels)).abs()
            return distance.argmin(-1).to(w.dtype)
        if self.kind == "float":
            codes = encode_float(units, int(self.levels[0]), int(self.levels[1]), self.levels[2])
            return torch.where((units < 0) & (codes > 0), codes + self._sign, codes)
        codes = torch.round(units)
        return (codes if self.kind == "minimum" else codes + zero).clamp(0, self.max_code)

    def decode(self, codes: Float[Tensor, "rows cols"], params: Params) -> Float[Tensor, "rows cols"]:
        """Weights that the codes stand for."""
        scale, zero = params
        if self.kind == "affine":
            return scale * (codes - zero)
        if self.kind == "minimum":
            return scale * codes + zero
        if self.kind == "float":
            negative = codes >= self._sign
            value = decode_float(codes - negative * self._sign, int(self.levels[0]), int(self.levels[1]))
            return scale * torch.where(negative, -value, value)
        return scale * codes.new_tensor(self.levels)[codes.long()]

    @property
    def _sign(self) -> int:
        """Sign bit of a float's codes; a zero has none."""
        return (self.max_code + 1) // 2


def in_numbers(arithmetic: Arithmetic) -> tuple[np.float32, int, np.ndarray]:
    """Largest code, index of the kind and levels of an arithmetic, in the types that compiled kernels take."""
    levels = np.asarray(arithmetic.levels, np.float32)
    return np.float32(arithmetic.max_code), KINDS.index(arithmetic.kind), levels
