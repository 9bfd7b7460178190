"""Uniform integer grids, INT2 to INT8: ŵ = s (clip(⌊w/s⌉ + z, 0, 2^b - 1) - z).

The range of a group is chosen by `search`:
  minmax   the extremes of the group;
  mse      the shrunken range p·[min, max], p in {1, .99, …, .21}, of least Σ|ŵ - w|^2.4, as the GPTQ code
           does (IST-DASLab/gptq quant.py; arXiv 2210.17323);
  hessian  the shrunken range of least output error (ŵ - w) H_gg (ŵ - w)ᵀ, H_gg the group's diagonal block of
           the Hessian: AWQ's clip search (arXiv 2306.00978, sec. 3.2) without touching an activation.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from gptq_awq.errors import UserError
from gptq_awq.grids.base import Params
from gptq_awq.kernels import best_range

Error = Callable[[Tensor], Tensor]
"""ŵ - w, (rows, cols) → what it costs, (rows, 1)."""

MSE_NORM, MSE_STEPS, MSE_MAX_SHRINK = 2.4, 100, 0.8
HESSIAN_STEPS, HESSIAN_MAX_SHRINK = 20, 0.5


@dataclass(frozen=True)
class IntGrid:
    """INT2-8, symmetric or asymmetric, per channel (`group_size=-1`) or in groups of columns.

    Attributes:
        bits: 2 to 8.
        group_size: columns that share a scale; -1 for the whole row. The last group may be shorter.
        sym: one fixed zero in the middle of the range, none stored.
        search: how a group's range is chosen, see the module's docstring.
        scale_dtype: precision that scales are stored in; they are rounded to it before any weight is encoded,
            so that what is measured is what a checkpoint holds.

    Raises:
        UserError: bits, group_size or search that no integer grid has.
    """

    bits: int = 4
    group_size: int = 64
    sym: bool = False
    search: Literal["minmax", "mse", "hessian"] = "minmax"
    scale_dtype: Literal["float32", "float16", "bfloat16"] = "float32"

    def __post_init__(self) -> None:
        if isinstance(self.bits, bool) or self.bits not in range(2, 9):
            raise UserError(f"bits={self.bits}: an integer grid takes bits 2 to 8 (method=fp leaves weights alone)")
        if isinstance(self.group_size, bool) or not (self.group_size == -1 or self.group_size >= 1):
            raise UserError(f"group_size={self.group_size}: give a number of columns, or -1 for per-channel")
        if self.search not in ("minmax", "mse", "hessian"):
            raise UserError(f"grid.search={self.search}: choose minmax, mse or hessian")

    @property
    def max_code(self) -> int:
        """2^bits - 1."""
        return 2**self.bits - 1

    @property
    def overhead_bits(self) -> int:
        """A 16-bit scale (32 if so asked) and, when asymmetric, a zero of `bits` bits."""
        scale_bits = 32 if self.scale_dtype == "float32" else 16
        return scale_bits + (0 if self.sym else self.bits)

    @property
    def needs_hessian(self) -> bool:
        """Only the `hessian` range search does."""
        return self.search == "hessian"

    def without_search(self) -> "IntGrid":
        """The same grid, fitted to the extremes: for loops that fit it often."""
        return replace(self, search="minmax")

    def fit(self, w: Float[Tensor, "rows cols"], hessian: Float[Tensor, "cols cols"] | None = None) -> Params:
        """Scale and zero of every row. Raises ValueError when `search=hessian` gets no Hessian block."""
        low, high = self._range(w)
        if self.search == "minmax":
            return self._params(low, high)
        if self.search == "mse":
            shrinks = [1 - i / MSE_STEPS for i in range(int(MSE_MAX_SHRINK * MSE_STEPS))]
            return self._least(w, low, high, shrinks, lambda e: e.abs().pow(MSE_NORM).sum(1, keepdim=True))
        if hessian is None:
            raise ValueError("grid.search=hessian needs the group's diagonal block of the Hessian")
        h = hessian.to(w)
        shrinks = [1 - i / HESSIAN_STEPS for i in range(int(HESSIAN_MAX_SHRINK * HESSIAN_STEPS) + 1)]
        if w.device.type == "cpu":
            return self._least_compiled(w, low, high, shrinks, h)
        return self._least(w, low, high, shrinks, lambda e: ((e @ h) * e).sum(1, keepdim=True))

    def encode(self, w: Float[Tensor, "rows cols"], params: Params) -> Float[Tensor, "rows cols"]:
        """clip(⌊w/s⌉ + z, 0, 2^b - 1)."""
        scale, zero = params
        return torch.clamp(torch.round(w / scale) + zero, 0, self.max_code)

    def decode(self, codes: Float[Tensor, "rows cols"], params: Params) -> Float[Tensor, "rows cols"]:
        """s (code - z)."""
        scale, zero = params
        return scale * (codes - zero)

    def _range(self, w: Tensor) -> tuple[Tensor, Tensor]:
        """Smallest interval that holds the row's weights and zero; symmetric where the grid is."""
        low, high = (v.reshape(-1, 1).clone() for v in torch.aminmax(w, dim=1))
        low, high = low.clamp(max=0), high.clamp(min=0)
        if self.sym:
            high = torch.maximum(-low, high)
            low = -high
        empty = (low == 0) & (high == 0)
        return torch.where(empty, -1.0, low), torch.where(empty, 1.0, high)

    def _params(self, low: Tensor, high: Tensor) -> Params:
        scale = (high - low) / self.max_code
        if self.scale_dtype != "float32":
            dtype = getattr(torch, self.scale_dtype)
            limits = torch.finfo(dtype)
            # A group of tiny weights must not get scale 0, nor a huge one scale inf.
            scale = scale.clamp(limits.tiny * limits.eps, limits.max).to(dtype).to(low.dtype)
        if self.sym:
            return scale, torch.full_like(scale, (self.max_code + 1) / 2)
        return scale, torch.round(-low / scale).clamp(0, self.max_code)

    def _least(self, w: Tensor, low: Tensor, high: Tensor, shrinks: list[float], error: Error) -> Params:
        """Per row, the shrunken range p·[low, high] of least `error(ŵ - w)`; the widest one on a tie."""
        best_scale, best_zero = self._params(low, high)
        best = torch.full_like(best_scale, torch.inf)
        for p in shrinks:
            scale, zero = params = self._params(p * low, p * high)
            e = error(self.decode(self.encode(w, params), params) - w)
            better = e < best
            best = torch.where(better, e, best)
            best_scale = torch.where(better, scale, best_scale)
            best_zero = torch.where(better, zero, best_zero)
        return best_scale, best_zero

    def _least_compiled(self, w: Tensor, low: Tensor, high: Tensor, shrinks: list[float], h: Tensor) -> Params:
        """The same for the output error, all candidates in one pass over the weights (see kernels.py)."""
        p = torch.tensor(shrinks, dtype=w.dtype)
        scales, zeros = self._params(low * p, high * p)
        best = torch.empty(len(w), dtype=torch.int64)
        weights, scale, zero, hessian = (x.contiguous().numpy() for x in (w, scales, zeros, h))
        best_range(weights, scale, zero, scale.dtype.type(self.max_code), hessian, best.numpy())
        return scales.gather(1, best[:, None]), zeros.gather(1, best[:, None])
