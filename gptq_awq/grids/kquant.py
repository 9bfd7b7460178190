"""llama.cpp's k-quants, Q2_K to Q6_K, and IQ4_XS: blocks of 256 columns; the scales of sub-blocks are quantized too.

  with a minimum (Q2_K, Q4_K, Q5_K)    ŵ = d σ c - d' μ      σ, μ unsigned integers per sub-block
  symmetric      (Q3_K, Q6_K)          ŵ = d σ (c - 2^(b-1)) σ a signed integer per sub-block
  table          (IQ4_XS)              ŵ = d σ t_c           σ a signed integer per sub-block, t IQ4_NL's levels

d and d' are float16, one each per block. Fitting has three steps: each sub-block's own range; d and d' such that the
largest scale and minimum just fit; then σ and μ again, chosen among the neighbours of their nearest codes to round the
sub-block's weights best. So a solver that rounds onto this grid sees the scales that the file will hold.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from gptq_awq.errors import UserError
from gptq_awq.grids.arithmetic import Arithmetic
from gptq_awq.grids.base import Fitted, SearchedGrid, extremes, sub_blocks
from gptq_awq.grids.search import least_squares, search_ranges, shrinks
from gptq_awq.grids.signed import signed_scales
from gptq_awq.grids.table import LEVELS
from gptq_awq.runtime.options import Search, checked_dataclass

BLOCK = 256
TABLE_SHRINKS = (1.0, 0.9, 0.8, 0.7)
"""Ranges of a table's sub-block whose codes are tried under search=hessian, in parts of the widest."""
COARSE, FINE = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5), (1.0, 0.97, 1.03)
"""Ranges that are tried under search=mse: in parts of the widest, then in parts of the best of these."""


@dataclass(frozen=True)
class KType:
    """Layout of one of llama.cpp's k-quants.

    Attributes:
        bits: bits of a code.
        sub_block: columns that share σ and μ.
        scale_bits: bits of σ and of μ.
        minimum: whether sub-blocks have a minimum, μ.
        levels: t by code; empty without a table.
    """

    bits: int
    sub_block: int
    scale_bits: int
    minimum: bool
    levels: tuple[float, ...] = ()


TYPES = {
    "q2_k": KType(2, 16, 4, minimum=True),
    "q3_k": KType(3, 16, 6, minimum=False),
    "q4_k": KType(4, 32, 6, minimum=True),
    "q5_k": KType(5, 32, 6, minimum=True),
    "q6_k": KType(6, 16, 8, minimum=False),
    "iq4_xs": KType(4, 32, 6, minimum=False, levels=LEVELS["iq4_nl"]),
}
_INSTEAD = {"q3_k": "q3_k_m", "q4_k": "q4_k_m", "q5_k": "q5_k_m", "iq4_xs": "iq4_nl"}
"""Choice of configs/grid that takes widths which are no multiple of 256; others have the type's own name."""


@checked_dataclass
class KGrid(SearchedGrid):
    """One of llama.cpp's k-quants as a grid.

    Attributes:
        type: q2_k, q3_k, q4_k, q5_k, q6_k or iq4_xs.
        search: how sub-blocks' ranges are chosen: minmax, mse or hessian (search.py).

    Raises:
        UserError: an unknown type or search.
    """

    type: Literal["q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "iq4_xs"] = "q4_k"
    search: Search = "minmax"

    @property
    def _type(self) -> KType:
        return TYPES[self.type]

    @property
    def bits(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Stored bits of a code."""
        return self._type.bits

    @property
    def group_size(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Columns of a sub-block, which share a scale."""
        return self._type.sub_block

    @property
    def label(self) -> str:
        """Name of the format in llama.cpp, for tables."""
        return self.type

    @property
    def span(self) -> int:
        """Columns of a block, which are fitted together."""
        return BLOCK

    @property
    def arithmetic(self) -> Arithmetic:
        """Arithmetic of codes above a minimum, around the middle code in symmetric formats, or of a table."""
        if self._type.levels:
            return Arithmetic("table", 2**self.bits - 1, self._type.levels)
        return Arithmetic("minimum" if self._type.minimum else "affine", 2**self.bits - 1)

    @property
    def overhead_bits(self) -> float:
        """Stored bits per sub-block besides the codes: σ and μ, and its share of d and d'."""
        return (2 if self._type.minimum else 1) * (self._type.scale_bits + 16 * self.group_size / BLOCK)

    @property
    def stored_dtype(self) -> str:
        """Dtype of a block's d and d': float16."""
        return "float16"

    def check_columns(self, columns: int, where: str) -> None:
        """Raise UserError for a number of columns that is no multiple of 256, the columns of a block."""
        if columns % BLOCK:
            raise UserError(
                f"grid={self.type}: {where} has {columns} columns, not a multiple of {BLOCK}; "
                f"grid={_INSTEAD.get(self.type, self.type)} takes such widths, as llama.cpp does there, and grid=q4_0 "
                "needs multiples of 32 only"
            )

    def fit(self, w: Float[Tensor, "rows 256"], hessian: Float[Tensor, "*spans 256 256"] | None = None) -> Fitted:
        """Fit the scales of one block of 256 columns. Raises ValueError when `search=hessian` gets no Hessian block."""
        parts, blocks = sub_blocks(w, hessian, self.group_size)
        return (self._with_minimum if self._type.minimum else self._symmetric)(parts, blocks, len(w))

    def _with_minimum(self, w: Tensor, h: Tensor | None, rows: int) -> Fitted:
        most = 2**self._type.scale_bits - 1
        # 1. Every sub-block's own range, which holds zero, as μ is unsigned.
        scales, minimums = (x.view(rows, -1) for x in self._own_range(w, h))
        # 2. The block's two scales.
        d, dmin = (half(x.amax(1, keepdim=True) / most) for x in (scales, -minimums))
        sigma, mu = _units(scales, d).clamp(0, most), _units(-minimums, dmin).clamp(0, most)
        # 3. The nearest codes of the scales, or their best neighbours.
        if self.search != "minmax":
            s, m = ((x[..., None] + _NEIGHBOURS.to(w)[:, i]).clamp(0, most) for i, x in enumerate((sigma, mu)))
            steps, lows = ((factor[..., None] * x).flatten(0, 1) for factor, x in ((d, s), (-dmin, m)))
            scale, minimum = search_ranges(w, steps, lows, self.arithmetic, self.search, h)
            sigma, mu = _units(scale.view(rows, -1), d), _units(-minimum.view(rows, -1), dmin)
        store = {"d": d, "dmin": dmin, "scale_codes": sigma, "min_codes": mu}
        return Fitted(d * sigma, -dmin * mu, store)

    def _own_range(self, w: Tensor, h: Tensor | None) -> tuple[Tensor, Tensor]:
        low, high = extremes(w)
        low, max_code = low.clamp(max=0), self.arithmetic.max_code
        high = torch.maximum(high, low)
        if self.search == "minmax":
            return (high - low) / max_code, low
        p = shrinks(w)
        # Both ends, and the upper one alone: with few levels the two tails differ.
        lows, highs = torch.cat([low * p, low.expand(-1, len(p))], 1), torch.cat([high * p, high * p], 1)
        return search_ranges(w, (highs - lows) / max_code, lows, self.arithmetic, self.search, h)

    def _symmetric(self, w: Tensor, h: Tensor | None, rows: int) -> Fitted:
        reach = 2 ** (self._type.scale_bits - 1)
        middle = 2 ** (self.bits - 1)
        # 1. Every sub-block's own scale, of either sign.
        scales = self._own_scale(w, h, middle).view(rows, -1)
        # 2. The block's scale: the largest sub-block gets the code that reaches furthest.
        d = half(-scales.gather(1, scales.abs().argmax(1, keepdim=True)) / reach)
        sigma = _units(scales, d).clamp(-reach, reach - 1)
        # 3. The nearest codes of the scales, or their best neighbours.
        if self.search != "minmax":
            s = (sigma[..., None] + torch.arange(-2, 3).to(w)).clamp(-reach, reach - 1)
            near = (d[..., None] * s).flatten(0, 1)
            scale, _ = search_ranges(w, near, torch.full_like(near, middle), self.arithmetic, self.search, h)
            sigma = _units(scale.view(rows, -1), d)
        return Fitted(d * sigma, torch.full_like(sigma, middle), {"d": d, "scale_codes": sigma})

    def _own_scale(self, w: Tensor, h: Tensor | None, middle: int) -> Float[Tensor, "parts 1"]:
        """Scale of either sign of every sub-block by itself."""
        levels = self._type.levels
        if levels and h is not None and self.search == "hessian":
            # Codes of few ranges, and the best scales for them by H's diagonal: step 3 has all of H.
            extreme = w.gather(1, w.abs().argmax(1, keepdim=True)) / levels[0]
            scales = extreme * w.new_tensor(TABLE_SHRINKS)
            scales = torch.cat([scales, scales * (levels[0] / levels[-1])], 1)
            return least_squares(w, scales, self.arithmetic, h.diagonal(dim1=1, dim2=2))
        scales = self._signed_scales(w)
        if self.search == "minmax":
            return scales
        best = search_ranges(w, scales, torch.full_like(scales, middle), self.arithmetic, self.search, h)[0]
        if not levels:
            return best
        near = best * w.new_tensor(FINE)
        return search_ranges(w, near, torch.zeros_like(near), self.arithmetic, self.search, h)[0]

    def _signed_scales(self, w: Tensor) -> Float[Tensor, "rows n"]:
        """Candidate scales of either sign for one sub-block."""
        levels = self._type.levels
        if not levels:
            return signed_scales(w, self.bits, self.search)
        scale = w.gather(1, w.abs().argmax(1, keepdim=True)) / levels[0]
        if self.search == "minmax":
            return scale
        scale = scale * w.new_tensor(COARSE)
        return torch.cat([scale, scale * (levels[0] / levels[-1])], 1)


# The code itself first, so that it wins a tie.
_NEIGHBOURS = torch.tensor(sorted(((i, j) for i in (-1, 0, 1) for j in (-2, -1, 0, 1, 2)), key=lambda n: n != (0, 0)))


def half(x: Tensor) -> Tensor:
    """Round to float16 and back, clamped to its range."""
    most = torch.finfo(torch.float16).max
    return x.clamp(-most, most).half().to(x.dtype)


def _units(x: Tensor, unit: Tensor) -> Tensor:
    """Nearest multiple of a unit, ⌊x / unit⌉; 0 where the unit is 0."""
    return torch.where(unit == 0, 0.0, torch.round(x / unit))
