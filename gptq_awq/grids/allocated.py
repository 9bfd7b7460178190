"""Integer grids whose bits are allocated under a budget, by what each linear's rounding costs the model's output.

The grid holds the budget and the choices and, once `gptq_awq.allocation` has found them between preflight and
quantization, the bits of each linear.
"""

from collections.abc import Mapping, Sequence
from dataclasses import field, replace
from itertools import product
from typing import Any, Literal, Protocol, runtime_checkable

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

    def name_of(self, width: Width) -> str:
        """Name of a width in reports: its bits, and its group size where the grid has several."""
        bits, group_size = width
        return f"{bits}g{group_size}" if self.group_sizes else str(bits)

    def facts_of(self, width: Width) -> dict[str, Any]:
        """Facts of a linear's width for reports."""
        bits, group_size = width
        return {"bits": bits, "group_size": group_size}

    @property
    def budget_option(self) -> str:
        """The budget as an option, for messages."""
        given = ("budget_bits", "budget_bytes", "budget_uniform")
        option = next(name for name in given if getattr(self, name) is not None)
        return f"grid.{option}={getattr(self, option)}"

    @property
    def counts_file(self) -> bool:
        """Whether the budget is of a whole file: it is of the linears alone."""
        return False

    def budget_in_bits(self, places: Sequence[Place], rows: Mapping[str, int], order: int = 0, beside: int = 0) -> int:
        """Bits that all linears may take together.

        Args:
            places: places of the linears.
            rows: rows of each linear's weight, by its full name.
            order: bits that each column's group takes, where groups aren't neighbouring columns.
            beside: bits of the file that hold other things, which this budget does not count.
        """
        del beside
        if self.budget_uniform is not None:
            uniform = self.grid((self.budget_uniform, self.group_size))
            return sum(stored_bits(uniform, rows[place.name], place.columns, order) for place in places)
        if self.budget_bytes is not None:
            return 8 * self.budget_bytes
        assert self.budget_bits is not None
        return int(self.budget_bits * sum(rows[place.name] * place.columns for place in places) + 1e-6)

    def grid(self, width: Width) -> IntGrid:
        """Integer grid of one width."""
        options: dict[str, Any] = {"search": self.search, "scale_dtype": self.scale_dtype}
        bits, group_size = width
        return IntGrid(bits, group_size, self.sym, **options)


def stored_bits(grid: Grid | None, rows: int, columns: int, order: int = 0) -> int:
    """Bits that a checkpoint stores for one weight: 16 per weight without a grid.

    Each column's group takes `order` bits more, unless one group holds all columns.
    """
    if grid is None:
        return 16 * rows * columns
    groups = 1 if grid.group_size == -1 else -(-columns // grid.group_size)
    codes = rows * (columns * grid.bits + groups * grid.overhead_bits)
    return round(codes) + (order * columns if groups > 1 else 0)


@runtime_checkable
class BudgetedGrid(Protocol):
    """A choice of grids whose widths are allocated under a budget: `AllocatedGrid`, or `GGUFGrid`."""

    @property
    def tie(self) -> str:
        """Linears that get one width."""
        ...

    @property
    def sensitivity(self) -> str:
        """How a width's cost is measured."""
        ...

    @property
    def rounding(self) -> str:
        """How weights are rounded to measure costs."""
        ...

    @property
    def windows(self) -> int:
        """Calibration windows that costs are measured on."""
        ...

    @property
    def widths(self) -> list[Any]:
        """All widths to choose among."""
        ...

    @property
    def allocated(self) -> Mapping[str, Any]:
        """Width by a weight's full name; empty before allocation."""
        ...

    @property
    def budget_option(self) -> str:
        """The budget as an option, for messages."""
        ...

    @property
    def counts_file(self) -> bool:
        """Whether the budget is of a whole file, and weights outside of the blocks count."""
        ...

    def fitting(self, columns: int) -> list[Any]:
        """Widths that a weight of so many columns can have."""
        ...

    def at(self, place: Place) -> Grid | None:
        """Grid of the weight at a place; None leaves it alone. Raises UserError where no width fits it."""
        ...

    def grid(self, width: Any) -> Grid:
        """Grid of one width."""
        ...

    def name_of(self, width: Any) -> str:
        """Name of a width in reports."""
        ...

    def facts_of(self, width: Any) -> dict[str, Any]:
        """Facts of a weight's width for reports."""
        ...

    def budget_in_bits(self, places: Sequence[Place], rows: Mapping[str, int], order: int = 0, beside: int = 0) -> int:
        """Bits that all weights at these places may take together."""
        ...

    def resolved(self, allocated: Mapping[str, Any]) -> Any:
        """This grid with the allocated widths filled in."""
        ...
