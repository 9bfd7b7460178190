"""Ternary grid, -s 0 s: the 1.58-bit grid of BitNet b1.58 (arXiv 2402.17764), s = mean |w| (eq. 3, "absmean").

BitNet trains with one s per matrix; rounding after training needs more: llama.cpp's TQ1_0 and TQ2_0 hold one float16 s
per 256 columns. `search` tries fractions and multiples of mean |w|.
"""

from dataclasses import replace
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from gptq_awq.grids.arithmetic import Arithmetic
from gptq_awq.grids.base import Fitted, SearchedGrid
from gptq_awq.grids.integer import stored
from gptq_awq.grids.search import search_ranges
from gptq_awq.runtime.options import Dtype, GroupSize, checked_dataclass


@checked_dataclass
class TernaryGrid(SearchedGrid):
    """Ternary grid: levels -s, 0 and s, with one scale per group.

    Attributes:
        group_size: columns that share a scale; -1 for the whole row; 256 in llama.cpp's files.
        search: how a group's scale is chosen: absmean, mse or hessian (search.py).
        scale_dtype: precision that scales are stored in.
        bits: stored bits of a code: log2(3) = 1.585 at best; 1.625 as TQ1_0 packs codes, 2 as TQ2_0 does.

    Raises:
        UserError: an invalid group_size or an unknown search.
    """

    group_size: GroupSize = 256
    search: Literal["absmean", "mse", "hessian"] = "absmean"
    scale_dtype: Dtype = "float16"
    bits: float = 1.625

    @property
    def arithmetic(self) -> Arithmetic:
        """Affine arithmetic in which codes 0, 1, 2 stand for -s, 0, s."""
        return Arithmetic("affine", 2)

    @property
    def overhead_bits(self) -> float:
        """Stored bits of a group's scale."""
        return 32 if self.scale_dtype == "float32" else 16

    def without_search(self) -> "TernaryGrid":
        """This grid with s = mean |w|, without a search."""
        return replace(self, search="absmean")

    def fit(self, w: Float[Tensor, "rows cols"], hessian: Float[Tensor, "*spans cols cols"] | None = None) -> Fitted:
        """Fit the scale of every row. Raises ValueError when `search=hessian` gets no Hessian block."""
        scale = w.abs().mean(1, keepdim=True)
        if self.search != "absmean":
            scale = scale * torch.linspace(0.5, 2.5, 41).to(w)
        scale = stored(scale, self.scale_dtype)
        ones = torch.ones_like(scale)
        if self.search == "absmean":
            return Fitted(scale, ones)
        return Fitted(*search_ranges(w, scale, ones, self.arithmetic, self.search, hessian))
