"""llama.cpp's symmetric blocks, Q4_0, Q5_0 and Q8_0: ŵ = s (c - 2^(b-1)), s a float16 of either sign.

Codes reach one step further down than up. The sign of s turns the long side to where the extreme weight is, so
that it is met exactly, which an unsigned scale cannot do.
"""

from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from gptq_awq.grids.arithmetic import Arithmetic
from gptq_awq.grids.base import Fitted, Grid
from gptq_awq.grids.integer import check_sizes
from gptq_awq.grids.search import best, check_search, shrinks


@dataclass(frozen=True)
class SignedGrid(Grid):
    """Symmetric codes with a float16 scale of either sign, in groups of 32.

    Attributes:
        bits: 4, 5 or 8 in llama.cpp's files.
        group_size: columns that share a scale; 32 in llama.cpp's files.
        search: how a group's scale is chosen: minmax, mse or hessian (search.py).

    Raises:
        UserError: bits, group_size or search that there isn't.
    """

    bits: int = 4
    group_size: int = 32
    search: Literal["minmax", "mse", "hessian"] = "minmax"

    def __post_init__(self) -> None:
        check_sizes(self.bits, self.group_size)
        check_search(self.search)

    @property
    def arithmetic(self) -> Arithmetic:
        """Affine around the middle code."""
        return Arithmetic("affine", 2**self.bits - 1)

    @property
    def overhead_bits(self) -> float:
        """A float16 scale."""
        return 16

    @property
    def needs_hessian(self) -> bool:
        """Only the `hessian` search does."""
        return self.search == "hessian"

    def without_search(self) -> "SignedGrid":
        """The same grid, fitted to the extremes."""
        return replace(self, search="minmax")

    def fit(self, w: Float[Tensor, "rows cols"], hessian: Float[Tensor, "*spans cols cols"] | None = None) -> Fitted:
        """Scale of every row. Raises ValueError when `search=hessian` gets no Hessian block."""
        scales = signed_scales(w, self.bits, self.search)
        most = torch.finfo(torch.float16).max
        scales = scales.clamp(-most, most).half().to(w.dtype)
        zeros = torch.full_like(scales, 2 ** (self.bits - 1))
        if self.search != "minmax":
            scales, zeros = best(w, scales, zeros, self.arithmetic, self.search, hessian)
        return Fitted(scales, zeros)


def signed_scales(w: Float[Tensor, "rows cols"], bits: int, search: str) -> Float[Tensor, "rows n"]:
    """Scales for codes -2^(b-1) … 2^(b-1)-1: the one that meets the extreme weight, then the search's others.

    Raises nothing; a row of zeros gets scale 0.
    """
    reach = 2 ** (bits - 1)
    extreme = w.gather(1, w.abs().argmax(1, keepdim=True))
    scale = -extreme / reach
    if search == "minmax":
        return scale
    p = shrinks(w)
    return torch.cat([scale * p, -scale * p * reach / (reach - 1)], 1)
