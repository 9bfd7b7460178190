"""Uniform integer grids, INT2 to INT8: ŵ = s (clip(⌊w/s⌉ + z, 0, 2^b - 1) - z).

The range of a group is chosen by `search`: `minmax` takes the extremes of the group, `mse` and `hessian` the best
of shrunken ranges p·[min, max] (see search.py).
"""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from gptq_awq.grids.arithmetic import Arithmetic
from gptq_awq.grids.base import Fitted, SearchedGrid, extremes
from gptq_awq.grids.search import search_ranges, shrinks
from gptq_awq.runtime.options import Bits, Dtype, GroupSize, Search, checked_dataclass

MSE_STEPS = 100, 0.79
"""Steps and largest shrink of the mse search, as in the GPTQ code: factors 1, .99, … .21."""


@checked_dataclass
class IntGrid(SearchedGrid):
    """Uniform integer grid INT2-8, symmetric or asymmetric, per channel (`group_size=-1`) or in groups of columns.

    Attributes:
        bits: bits of a code, 2 to 8.
        group_size: columns that share a scale; -1 for the whole row. The last group may be shorter.
        sym: whether the zero point is fixed at the middle code, so that none is stored.
        search: how a group's range is chosen, see the module's docstring.
        scale_dtype: precision that scales are stored in; they are rounded to it before any weight is encoded,
            so that what is measured is what a checkpoint holds.
        min_zero: smallest zero point of an asymmetric grid: 1 for checkpoints that store zero - 1.

    Raises:
        UserError: bits, group_size or search that no integer grid has.
    """

    bits: Bits = 4
    group_size: GroupSize = 64
    sym: bool = False
    search: Search = "minmax"
    scale_dtype: Dtype = "float32"
    min_zero: Literal[0, 1] = 0

    @property
    def arithmetic(self) -> Arithmetic:
        """Affine arithmetic with codes 0 to 2^bits - 1."""
        return Arithmetic("affine", 2**self.bits - 1)

    @property
    def overhead_bits(self) -> float:
        """Stored bits of a group's scale (16 or 32) and, when asymmetric, its zero (`bits`)."""
        return scale_bits(self.scale_dtype) + (0 if self.sym else self.bits)

    def fit(self, w: Float[Tensor, "rows cols"], hessian: Float[Tensor, "*spans cols cols"] | None = None) -> Fitted:
        """Fit scale and zero of every row. Raises ValueError when `search=hessian` gets no Hessian block."""
        low, high = self._range(w)
        if self.search == "minmax":
            return Fitted(*self._params(low, high))
        p = shrinks(w, *MSE_STEPS) if self.search == "mse" else shrinks(w)
        scales, zeros = self._params(low * p, high * p)
        return Fitted(*search_ranges(w, scales, zeros, self.arithmetic, self.search, hessian))

    def _range(self, w: Tensor) -> tuple[Tensor, Tensor]:
        """Smallest interval that holds the row's weights and zero, symmetric if the grid is; ±1 for a row of zeros."""
        low, high = extremes(w)
        low, high = low.clamp(max=0), high.clamp(min=0)
        if self.sym:
            high = torch.maximum(-low, high)
            low = -high
        empty = (low == 0) & (high == 0)
        return torch.where(empty, -1.0, low), torch.where(empty, 1.0, high)

    def _params(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        max_code = self.arithmetic.max_code
        scale = stored((high - low) / max_code, self.scale_dtype)
        if self.sym:
            return scale, torch.full_like(scale, (max_code + 1) / 2)
        return scale, torch.round(-low / scale).clamp(self.min_zero, max_code)


def scale_bits(dtype: str) -> int:
    """Bits of one stored scale of the given dtype."""
    return 32 if dtype == "float32" else 16


def stored(scale: Tensor, dtype: str) -> Tensor:
    """Round positive scales to `dtype` and back, clamped so that none becomes 0 or infinite."""
    if dtype == "float32":
        return scale
    limits = torch.finfo(getattr(torch, dtype))
    return scale.clamp(limits.tiny * limits.eps, limits.max).to(getattr(torch, dtype)).to(scale.dtype)
