"""Grids of sixteen tabulated levels, ŵ = s t_c: NF4 and FP4 of bitsandbytes, IQ4_NL of llama.cpp.

NF4 (QLoRA, arXiv 2305.14314, app. E): levels at quantiles of the normal distribution, zero among them. With double
quantization (sec. 3) the mean of all s is subtracted from each, and the differences are rounded to 8 bits of a dynamic
exponent (Dettmers, arXiv 1511.04561), with a float32 scale per 256 groups.
"""

import functools
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from gptq_awq.errors import UserError
from gptq_awq.grids.arithmetic import Arithmetic
from gptq_awq.grids.base import Fitted, SearchedGrid, group_spans
from gptq_awq.grids.search import search_ranges, shrinks
from gptq_awq.runtime.options import Bits, GroupSize, Search, checked_dataclass

# Quantiles of N(0, 1), eight above zero and seven below, scaled to ±1 (QLoRA, app. E).
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
# Sign, two bits of exponent, one of mantissa, scaled to ±1, in the order of bitsandbytes' codes.
_FP4 = (0.0, 0.0625 / 12, 8 / 12, 12 / 12, 4 / 12, 6 / 12, 2 / 12, 3 / 12)
FP4 = (*_FP4, *(-level for level in _FP4))
# llama.cpp's integer levels, finer around zero.
IQ4_NL = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
LEVELS = {"nf4": NF4, "fp4": FP4, "iq4_nl": tuple(map(float, IQ4_NL))}
NESTED_GROUPS = 256


@checked_dataclass
class TableGrid(SearchedGrid):
    """Grid of sixteen tabulated levels, scaled so that the outermost one meets the group's largest weight.

    Attributes:
        table: nf4, fp4 or iq4_nl. Scales of iq4_nl are float16 of either sign, the others' positive float32.
        group_size: columns that share a scale.
        search: how the scale is chosen: minmax (the largest magnitude), mse or hessian (search.py).
        double_quant: whether scales are quantized too; they are then fitted all at once.
        bits: bits of a code, 4 for sixteen levels.

    Raises:
        UserError: an unknown table or search, an invalid group_size, or double_quant with iq4_nl.
    """

    table: Literal["nf4", "fp4", "iq4_nl"] = "nf4"
    group_size: GroupSize = 64
    search: Search = "minmax"
    double_quant: bool = False
    bits: Bits = 4

    def __post_init__(self) -> None:
        if self.double_quant and self._signed:
            raise UserError("grid.double_quant=true: iq4_nl has no room for it, nf4 and fp4 do")

    @property
    def label(self) -> str:
        """Name of the grid in tables: its table, with `+dq` where scales are quantized."""
        return f"{self.table}{'+dq' if self.double_quant else ''}"

    @property
    def span(self) -> int:
        """Columns that are fitted together: a group, or all of them where scales are quantized and share a mean."""
        return -1 if self.double_quant else self.group_size

    @property
    def rows_independent(self) -> bool:
        """True unless scales are quantized, since they share a mean over all rows."""
        return not self.double_quant

    @property
    def arithmetic(self) -> Arithmetic:
        """Arithmetic of the table's levels, rounded to float32."""
        return Arithmetic("table", 15, tuple(torch.tensor(LEVELS[self.table]).tolist()))

    @property
    def overhead_bits(self) -> float:
        """Stored bits of a group's scale: 16 or 32, or with double quantization 8 and a share of the nested scale."""
        if self.double_quant:
            return 8 + 32 / NESTED_GROUPS
        return 16 if self._signed else 32

    @property
    def stored_dtype(self) -> str:
        """Dtype that scales are stored in: float16 for iq4_nl, float32 for the others."""
        return "float16" if self._signed else "float32"

    @property
    def _signed(self) -> bool:
        return self.table == "iq4_nl"

    def fit(self, w: Float[Tensor, "rows cols"], hessian: Float[Tensor, "*spans cols cols"] | None = None) -> Fitted:
        """Fit the scales of one group, or of all. Raises ValueError when `search=hessian` gets no Hessian block."""
        parts = []
        for a, b in group_spans(w.shape[1], self.group_size):
            parts.append(self._fit_group(w[:, a:b], None if hessian is None else hessian[..., a:b, a:b]))
        scales = torch.cat(parts, 1)
        if not self.double_quant:
            return Fitted(scales, torch.zeros_like(scales))
        scales, store = double_quantized(scales)
        return Fitted(scales, torch.zeros_like(scales), store)

    def _fit_group(self, w: Tensor, h: Tensor | None) -> Tensor:
        extreme = w.gather(1, w.abs().argmax(1, keepdim=True))
        scale = extreme / LEVELS[self.table][0] if self._signed else extreme.abs()
        if self.search != "minmax":
            scale = scale * shrinks(w)
            scale = torch.cat([scale, -scale * 127 / 113], 1) if self._signed else scale
        if self._signed:
            scale = scale.clamp(-65504, 65504).half().to(w.dtype)
        if self.search == "minmax":
            return scale
        return search_ranges(w, scale, torch.zeros_like(scale), self.arithmetic, self.search, h)[0]


def double_quantized(scales: Float[Tensor, "rows groups"]) -> tuple[Float[Tensor, "rows groups"], dict[str, Tensor]]:
    """Round scales to 8-bit double quantization; returns the rounded scales and the tensors that are stored.

    Scales are taken in row-major order, as in bitsandbytes. The store is `absmax_codes` (rows, groups),
    `nested_scales` (1, ⌈rows·groups / 256⌉), `offset` (1, 1): s = offset + nested_scale · dynamic_levels()[code].
    """
    offset = scales.mean()
    flat = (scales - offset).flatten()
    padded = torch.nn.functional.pad(flat, (0, -len(flat) % NESTED_GROUPS)).reshape(-1, NESTED_GROUPS)
    nested = padded.abs().amax(1, keepdim=True)
    levels = dynamic_levels().to(scales)
    units = torch.where(nested == 0, 0.0, padded / nested)
    codes = torch.bucketize(units, (levels[1:] + levels[:-1]) / 2)
    absmax = (levels[codes] * nested).flatten()[: len(flat)].reshape(scales.shape) + offset
    codes = codes.flatten()[: len(flat)].reshape(scales.shape)
    return absmax, {"absmax_codes": codes, "nested_scales": nested.T, "offset": offset.reshape(1, 1)}


@functools.cache
def dynamic_levels() -> Float[Tensor, "256"]:
    """Levels of the signed 8-bit dynamic-exponent data type (arXiv 1511.04561), in ascending order.

    Each of seven decades has twice as many levels as the decade below it.
    """
    levels = [0.0, 1.0]
    for decade in range(7):
        edges = torch.linspace(0.1, 1, 2**decade + 1)
        means = 10.0 ** (decade - 6) * (edges[1:] + edges[:-1]) / 2
        levels += means.tolist() + (-means).tolist()
    return torch.tensor(sorted(levels))
