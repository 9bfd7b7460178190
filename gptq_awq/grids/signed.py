"""llama.cpp's symmetric blocks, Q4_0, Q5_0 and Q8_0: ŵ = s (c - 2^(b-1)), s a float16 of either sign.

Codes reach one step further down than up. The sign of s turns the longer side towards the extreme weight, which is
thus met exactly; an unsigned scale cannot do that.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from gptq_awq.grids.arithmetic import Arithmetic
from gptq_awq.grids.base import Fitted, SearchedGrid
from gptq_awq.grids.search import even_steps, search_ranges, shrinks
from gptq_awq.runtime.options import Bits, GroupSize, Search, checked_dataclass


@checked_dataclass
class SignedGrid(SearchedGrid):
    """Symmetric integer grid with a float16 scale of either sign per group.

    Attributes:
        bits: bits of a code; 4, 5 or 8 in llama.cpp's files.
        group_size: columns that share a scale; 32 in llama.cpp's files.
        search: how a group's scale is chosen: minmax, mse or hessian (search.py).

    Raises:
        UserError: bits, group_size or search that the grid does not have.
    """

    bits: Bits = 4
    group_size: GroupSize = 32
    search: Search = "minmax"

    @property
    def arithmetic(self) -> Arithmetic:
        """Affine arithmetic around the middle code."""
        return Arithmetic("affine", 2**self.bits - 1)

    @property
    def overhead_bits(self) -> float:
        """Stored bits of a group's float16 scale."""
        return 16

    @property
    def stored_dtype(self) -> str:
        """Dtype that scales are stored in: float16."""
        return "float16"

    def fit(self, w: Float[Tensor, "rows cols"], hessian: Float[Tensor, "*spans cols cols"] | None = None) -> Fitted:
        """Fit the scale of every row. Raises ValueError when `search=hessian` gets no Hessian block."""
        scales = signed_scales(w, self.bits, self.search)
        if self.search != "minmax":
            reach = 2 ** (self.bits - 1)  # as many steps: the first scale of all
            scales = torch.cat([scales, scales[:, :1] * reach / even_steps(w, reach, most=16)[1:]], 1)
        most = torch.finfo(torch.float16).max
        scales = scales.clamp(-most, most).half().to(w.dtype)
        zeros = torch.full_like(scales, 2 ** (self.bits - 1))
        if self.search != "minmax":
            scales, zeros = search_ranges(w, scales, zeros, self.arithmetic, self.search, hessian)
        return Fitted(scales, zeros)


def signed_scales(w: Float[Tensor, "rows cols"], bits: int, search: str) -> Float[Tensor, "rows n"]:
    """Candidate scales for codes -2^(b-1) … 2^(b-1)-1: the one that meets the extreme weight, then those of the search.

    A row of zeros gets scale 0.
    """
    reach = 2 ** (bits - 1)
    extreme = w.gather(1, w.abs().argmax(1, keepdim=True))
    scale = -extreme / reach
    if search == "minmax":
        return scale
    p = shrinks(w)
    return torch.cat([scale * p, -scale * p * reach / (reach - 1)], 1)
