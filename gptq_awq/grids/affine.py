"""Uniform grids above a stored minimum: ŵ = s c + m, both s and m floating-point numbers.

MLX's affine format (any bits, groups of 32, 64 or 128) and llama.cpp's Q4_1 and Q5_1 (groups of 32, float16). An
integer zero point needs fewer bits; a minimum fits ranges that don't hold zero.
"""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from gptq_awq.grids.arithmetic import Arithmetic
from gptq_awq.grids.base import Fitted, SearchedGrid, extremes
from gptq_awq.grids.hqq import half_quadratic
from gptq_awq.grids.integer import scale_bits
from gptq_awq.grids.search import even_steps, search_ranges, shrinks
from gptq_awq.runtime.options import Bits, Dtype, GroupSize, Search, checked_dataclass


@checked_dataclass
class AffineGrid(SearchedGrid):
    """Uniform grid of 2 to 8 bits, with a floating-point scale and minimum per group.

    Attributes:
        bits: bits of a code, 2 to 8.
        group_size: columns that share a scale; -1 for the whole row.
        search: how a group's range is chosen: minmax, mse, hessian (search.py), or hqq, for the minimum (hqq.py).
        scale_dtype: precision that scales and minimums are stored in.

    Raises:
        UserError: bits, group_size or search that the grid does not have.
    """

    bits: Bits = 4
    group_size: GroupSize = 32
    search: Search | Literal["hqq"] = "minmax"
    scale_dtype: Dtype = "float16"

    @property
    def arithmetic(self) -> Arithmetic:
        """Arithmetic of codes that count upward from a minimum."""
        return Arithmetic("minimum", 2**self.bits - 1)

    @property
    def overhead_bits(self) -> float:
        """Stored bits of a group's scale and minimum."""
        return 2 * scale_bits(self.scale_dtype)

    def fit(self, w: Float[Tensor, "rows cols"], hessian: Float[Tensor, "*spans cols cols"] | None = None) -> Fitted:
        """Fit scale and minimum of every row. Raises ValueError when `search=hessian` gets no Hessian block."""
        low, high = extremes(w)
        if self.search == "minmax":
            return Fitted(*self._params(low, high))
        if self.search == "hqq":
            scale, minimum = self._params(low, high)
            return Fitted(scale, self._stored(half_quadratic(w, scale, minimum, self.arithmetic)))
        # Ranges shrink towards their middle, as they need not hold zero.
        middle, half = (low + high) / 2, (high - low) / 2
        p = shrinks(w)
        wider = low + (high - low) * (self.arithmetic.max_code / even_steps(w, self.arithmetic.max_code))
        lows = torch.cat([middle - half * p, low.expand_as(wider)], 1)
        scales, minimums = self._params(lows, torch.cat([middle + half * p, wider], 1))
        return Fitted(*search_ranges(w, scales, minimums, self.arithmetic, self.search, hessian))

    def _params(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        # A scale may be zero here: the group then holds no value but its minimum.
        dtype = getattr(torch, self.scale_dtype)
        most = torch.finfo(dtype).max
        scale = (high - low) / self.arithmetic.max_code
        return scale.clamp(max=most).to(dtype).to(low.dtype), self._stored(low)

    def _stored(self, minimum: Tensor) -> Tensor:
        dtype = getattr(torch, self.scale_dtype)
        most = torch.finfo(dtype).max
        return minimum.clamp(-most, most).to(dtype).to(minimum.dtype)
