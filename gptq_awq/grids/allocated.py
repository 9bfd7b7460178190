"""Integer grids whose bits are allocated under a budget, by what each linear's rounding costs the model's output.

The grid holds the budget and the choices and, once `gptq_awq.allocation` has found them between preflight and
quantization, the bits of each linear.
"""

from collections.abc import Mapping, Sequence
from dataclasses import field, replace
from itertools import product
from typing import Any, Literal

from gptq_awq.errors import UserError
from gptq_awq.grids.base import Grid, Place
from gptq_awq.grids.integer import IntGrid
from gptq_awq.runtime.options import Bits, Dtype, GroupSize, PositiveFloat, PositiveInt, Search, checked_dataclass

Width = tuple[int, int]
"""Bits and group size."""


@checked_dataclass
class AllocatedGrid:
    """A mix of `IntGrid`s whose bits fit a budget at the least predicted cost.

    Attributes:
        budget_bits: stored bits per weight, on average over the blocks' linears, scales and zeros included.
        budget_bytes: stored bytes of all those linears together; replaces budget_bits.
        budget_uniform: bits of a uniform grid, in groups of group_size, whose stored size is the budget; replaces both.
        choices: bits to choose among.
        tie: which linears share their bits: none, each `linear` has its own; the linears of a `site` (q, k and v;
            gate and up), which some engines fuse; or all of the `model`: uniform bits, the most that fit.
        sensitivity: measure of a rounding's cost: `fisher`, `error` or `kl` (see allocation/sensitivity.py).
        rounding: how weights are rounded to measure costs: by the method's `solver`, or by `rtn`, which is faster.
        windows: number of calibration windows that gradients (fisher) or losses (kl) are computed on.
        group_size: columns that share a scale; -1 for the whole row. Once `allocated` is known, that of most linears.
        group_sizes: group sizes to choose among, in any combination with the bits, for linears whose columns they
            divide; None: group_size only.
        sym: see `IntGrid`, as are search and scale_dtype.
        allocated: bits and group size by a linear's full name; empty before allocation.

    Raises:
        UserError: not exactly one budget, bits that no integer grid has, or an unknown value of an option.
    """

    budget_bits: PositiveFloat | None = 4.0
    budget_bytes: PositiveInt | None = None
    budget_uniform: Bits | None = None
    choices: Sequence[Bits] = (2, 3, 4, 5, 6, 8)
    tie: Literal["linear", "site", "model"] = "linear"
    sensitivity: Literal["fisher", "error", "kl"] = "fisher"
    rounding: Literal["solver", "rtn"] = "solver"
    windows: PositiveInt = 8
    group_size: GroupSize = 64
    group_sizes: Sequence[PositiveInt] | None = None
    sym: bool = False
    search: Search = "minmax"
    scale_dtype: Dtype = "float16"
    allocated: Mapping[str, Width] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if [self.budget_bits, self.budget_bytes, self.budget_uniform].count(None) != 2:
            raise UserError(
                "grid.budget_bits, grid.budget_bytes, grid.budget_uniform: give one of them, and null for the others"
            )
        if not self.choices:
            raise UserError("grid.choices=[]: give some bits to choose among, such as [2,3,4,6]")
        if self.group_sizes is not None and not self.group_sizes:
            raise UserError("grid.group_sizes=[]: give some to choose among, such as [32,64,128], or null")
        uniform = [] if self.budget_uniform is None else [(self.budget_uniform, self.group_size)]
        for width in [*uniform, *self.widths]:
            self.grid(width)

    @property
    def widths(self) -> list[Width]:
        """All widths to choose among: each of the bits with each group size."""
        return list(product(self.choices, self.group_sizes or [self.group_size]))

    def fitting(self, columns: int) -> list[Width]:
        """Widths whose groups divide a linear's columns; all widths where none do."""
        return [width for width in self.widths if columns % width[1] == 0] or self.widths

    @property
    def bits(self) -> float:
        """Bits in tables: `budget_uniform`, or those of most linears; before allocation, the widest choice."""
        if self.budget_uniform is not None:
            return self.budget_uniform
        allocated = [bits for bits, _ in self.allocated.values()]
        return max(self.choices, key=allocated.count) if allocated else max(self.choices)

    @property
    def needs_hessian(self) -> bool:
        """True before allocation, whose costs are output errors; afterwards, for `search=hessian` only."""
        return not self.allocated or self.search == "hessian"

    @property
    def label(self) -> str:
        """Name of the grid in tables."""
        return "allocated"

    def at(self, place: Place) -> Grid | None:
        """Grid of the weight at a place; None for embeddings and for output heads without `place.head`.

        A head with `place.head` gets the most bits and the first group size; the budget does not count it. Before
        allocation, blocks take turns among the choices, since a checkpoint format must be able to hold any mix.
        """
        if place.head:
            return self.grid(max(self.fitting(place.columns), key=lambda width: width[0]))
        if place.block < 0:
            return None
        fitting = self.fitting(place.columns)
        return self.grid(self.allocated.get(place.name, fitting[place.block % len(fitting)]))

    def resolved(self, allocated: Mapping[str, Width]) -> "AllocatedGrid":
        """This grid with the allocated widths, by a linear's full name, filled in."""
        sizes = [size for _, size in allocated.values()]
        usual = max(sizes, key=sizes.count, default=self.group_size)
        group_size = self.group_size if self.budget_uniform is not None else usual
        return replace(self, allocated=allocated, group_size=group_size)

    def grid(self, width: Width) -> IntGrid:
        """Integer grid of one width."""
        options: dict[str, Any] = {"search": self.search, "scale_dtype": self.scale_dtype}
        bits, group_size = width
        return IntGrid(bits, group_size, self.sym, **options)
