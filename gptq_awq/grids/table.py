"""Tables of sixteen levels: ŵ = s t_c. NF4 and FP4 of bitsandbytes, IQ4_NL of llama.cpp.

NF4 (QLoRA, arXiv 2305.14314, app. E): levels at quantiles of the normal distribution, zero among them. With double
quantization (sec. 3) the s of 256 groups share a float32 scale, each s less the mean of all of them being rounded to
8 bits of a dynamic exponent (Dettmers, arXiv 1511.04561).
"""

import functools
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from gptq_awq.errors import UserError
from gptq_awq.grids.arithmetic import Arithmetic
from gptq_awq.grids.base import Fitted, Grid, group_spans
from gptq_awq.grids.integer import check_sizes
from gptq_awq.grids.search import best, check_search, shrinks

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
# llama.cpp's, integers; finer around zero.
IQ4_NL = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
LEVELS = {"nf4": NF4, "fp4": FP4, "iq4_nl": tuple(map(float, IQ4_NL))}
NESTED_GROUPS = 256


@dataclass(frozen=True)
class TableGrid(Grid):
    """Sixteen levels, scaled so that the outermost one meets the group's largest weight.

    Attributes:
        table: nf4, fp4 or iq4_nl. The last one's scales are float16 of either sign, the others' float32.
        group_size: columns that share a scale.
        search: how the scale is chosen: minmax (the largest magnitude), mse or hessian (search.py).
        double_quant: quantize the scales too; they are then fitted all at once.

    Raises:
        UserError: a table, group_size or search that there isn't.
    """

    table: str = "nf4"
    group_size: int = 64
    search: Literal["minmax", "mse", "hessian"] = "minmax"
    double_quant: bool = False
    bits: int = 4

    def __post_init__(self) -> None:
        if self.table not in LEVELS:
            raise UserError(f"grid.table={self.table}: choose one of {', '.join(LEVELS)}")
        check_sizes(self.bits, self.group_size)
        check_search(self.search)
        if self.double_quant and self._signed:
            raise UserError("grid.double_quant=true: iq4_nl has no room for it, nf4 and fp4 do")

    @property
    def label(self) -> str:
        """The table, and whether its scales are quantized."""
        return f"{self.table}{'+dq' if self.double_quant else ''}"

    @property
    def span(self) -> int:
        """All columns where scales are quantized: they share a mean."""
        return -1 if self.double_quant else self.group_size

    @property
    def rows_independent(self) -> bool:
        """Unless scales are quantized."""
        return not self.double_quant

    @property
    def arithmetic(self) -> Arithmetic:
        """A table, as float32 holds it."""
        return Arithmetic("table", 15, tuple(torch.tensor(LEVELS[self.table]).tolist()))

    @property
    def overhead_bits(self) -> float:
        """A scale of its own, or 8 bits and a share of the next level's scale."""
        if self.double_quant:
            return 8 + 32 / NESTED_GROUPS
        return 16 if self._signed else 32

    @property
    def _signed(self) -> bool:
        return self.table == "iq4_nl"

    @property
    def needs_hessian(self) -> bool:
        """Only the `hessian` search does."""
        return self.search == "hessian"

    def without_search(self) -> "TableGrid":
        """The same grid, scaled by the largest magnitude."""
        return replace(self, search="minmax")

    def fit(self, w: Float[Tensor, "rows cols"], hessian: Float[Tensor, "*spans cols cols"] | None = None) -> Fitted:
        """Scales of one group, or of all. Raises ValueError when `search=hessian` gets no Hessian block."""
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
        return (
            scale
            if self.search == "minmax"
            else best(w, scale, torch.zeros_like(scale), self.arithmetic, self.search, h)[0]
        )


def double_quantized(scales: Float[Tensor, "rows groups"]) -> tuple[Float[Tensor, "rows groups"], dict[str, Tensor]]:
    """Scales as 8-bit double quantization holds them, and what it stores.

    Scales are taken in row-major order, as bitsandbytes does. The store is `absmax_codes` (rows, groups),
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
    """The signed 8-bit dynamic-exponent data type (arXiv 1511.04561): decades, each halved as often as bits allow."""
    levels = [0.0, 1.0]
    for decade in range(7):
        edges = torch.linspace(0.1, 1, 2**decade + 1)
        means = 10.0 ** (decade - 6) * (edges[1:] + edges[:-1]) / 2
        levels += means.tolist() + (-means).tolist()
    return torch.tensor(sorted(levels))
