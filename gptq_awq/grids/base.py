"""Grid: where weights may land, and QuantizedWeight: weights that have landed.

A grid sees one group of columns at a time: `fit` chooses a scale and a zero per row, `encode` rounds to
integer codes, `decode` maps codes back. Solvers decide *which* neighbour a weight lands on; grids only say
what the neighbours are. A new number format is one file with one frozen dataclass that has these members.
"""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

Params = tuple[Float[Tensor, "rows #cols"], Float[Tensor, "rows #cols"]]
"""Scale and zero: (rows, 1) for one group of columns, (rows, cols) where each column has its own."""


@runtime_checkable
class Grid(Protocol):
    """A family of quantization grids, one member per (row, group)."""

    @property
    def bits(self) -> int:
        """Bits of one code."""
        ...

    @property
    def group_size(self) -> int:
        """Columns that share a scale; -1 means all of them."""
        ...

    @property
    def max_code(self) -> int | None:
        """Largest code of an affine grid (scale * (code - zero)); None where the grid isn't affine."""
        ...

    @property
    def overhead_bits(self) -> int:
        """Stored bits per (row, group) besides the codes: scales, zeros."""
        ...

    @property
    def needs_hessian(self) -> bool:
        """Whether `fit` wants the group's diagonal block of the Hessian."""
        ...

    def without_search(self) -> "Grid":
        """The same grid with the cheapest fit, which needs no Hessian."""
        ...

    def fit(self, w: Float[Tensor, "rows cols"], hessian: Float[Tensor, "cols cols"] | None = None) -> Params:
        """Choose scale and zero for every row of one group."""
        ...

    def encode(self, w: Float[Tensor, "rows cols"], params: Params) -> Float[Tensor, "rows cols"]:
        """Round to codes (integers 0..2^bits-1, in a float tensor)."""
        ...

    def decode(self, codes: Float[Tensor, "rows cols"], params: Params) -> Float[Tensor, "rows cols"]:
        """Map codes to weights."""
        ...


def group_spans(columns: int, group_size: int) -> list[tuple[int, int]]:
    """First column of every group and one past its last; the last group is shorter where sizes don't divide."""
    size = columns if group_size == -1 else group_size
    return [(start, min(start + size, columns)) for start in range(0, columns, size)]


def group_of_columns(columns: int, group_size: int) -> Int[Tensor, "in"]:
    """The group each column belongs to, in natural order."""
    return torch.arange(columns) // (columns if group_size == -1 else group_size)


@dataclass(frozen=True)
class QuantizedWeight:
    """One linear's weight on its grid: exactly what a checkpoint stores.

    Attributes:
        codes: integer codes, (out, in), columns in the layer's own order.
        scales: (out, groups), in weight units.
        zeros: (out, groups), in code units.
        group_of_column: (in,), the group of each column (`g_idx`); natural order unless act_order permuted it.
        grid: the format.
        loss: the solver's own objective ½ tr(ΔHΔᵀ) (H damped, as GPTQ sums it), None where no H was given.
    """

    codes: UInt8[Tensor, "out in"]
    scales: Float[Tensor, "out groups"]
    zeros: Float[Tensor, "out groups"]
    group_of_column: Int[Tensor, "in"]
    grid: Grid
    loss: float | None = None

    def dequantize(self) -> Float[Tensor, "out in"]:
        """The weight that an engine computes with."""
        return self.grid.decode(self.codes.to(self.scales.dtype), self._per_column_params())

    def _per_column_params(self) -> Params:
        index = self.group_of_column.to(self.scales.device)
        return self.scales[:, index], self.zeros[:, index]

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per weight: codes, scales, zeros, and the column order where it isn't natural."""
        columns = self.codes.shape[1]
        out_of_order = bool((self.group_of_column.diff() < 0).any())
        order_bits = 32 * columns if out_of_order else 0
        stored = self.codes.numel() * self.grid.bits + self.scales.numel() * self.grid.overhead_bits + order_bits
        return stored / self.codes.numel()
