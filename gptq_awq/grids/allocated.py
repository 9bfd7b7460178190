"""Integer grids whose bits are allocated under a budget, by what each linear's rounding costs the model's output.

The grid only holds the question (budget, choices) and, once it is known, the answer: bits by linear. Between
preflight and quantization `gptq_awq.allocation` finds it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any, Literal

from gptq_awq.errors import UserError
from gptq_awq.grids.base import Grid, Place
from gptq_awq.grids.integer import IntGrid

Width = tuple[int, int]
"""Bits and group size."""


@dataclass(frozen=True)
class AllocatedGrid:
    """`IntGrid`s of the bits that fit the budget best.

    Attributes:
        budget_bits: stored bits per weight, on average over the blocks' linears, scales and zeros included.
        budget_bytes: of all those linears, instead of budget_bits.
        budget_uniform: the bits of a uniform grid, in groups of group_size, whose size is the budget; instead of both.
        choices: bits to choose among.
        tie: what gets the same bits: each `linear` by itself; the linears of a `site` (q, k and v; gate and up),
            which some engines fuse; or all of the `model`: uniform bits, the most that fit.
        sensitivity: what a rounding costs: `fisher`, `error` or `kl` (see allocation/sensitivity.py).
        rounding: what the costs are measured on: the method's `solver`, or `rtn`, which is quicker.
        windows: calibration windows that gradients (fisher) or losses (kl) are measured on.
        group_size: columns that share a scale; -1 for the whole row. Of most linears, once `allocated` is known.
        group_sizes: to choose among beside the bits, each with each, for linears whose columns they divide; None:
            group_size alone.
        sym: see `IntGrid`, as are search and scale_dtype.
        allocated: bits and group size by a linear's full name; empty until they are known.

    Raises:
        UserError: not one of the budgets, bits that no integer grid has, a word there isn't.
    """

    budget_bits: float | None = 4.0
    budget_bytes: int | None = None
    budget_uniform: int | None = None
    choices: Sequence[int] = (2, 3, 4, 5, 6, 8)
    tie: Literal["linear", "site", "model"] = "linear"
    sensitivity: Literal["fisher", "error", "kl"] = "fisher"
    rounding: Literal["solver", "rtn"] = "solver"
    windows: int = 8
    group_size: int = 64
    group_sizes: Sequence[int] | None = None
    sym: bool = False
    search: str = "minmax"
    scale_dtype: str = "float16"
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
        sensitivities, ties = ("fisher", "error", "kl"), ("linear", "site", "model")
        for option, known in {"tie": ties, "sensitivity": sensitivities, "rounding": ("solver", "rtn")}.items():
            if getattr(self, option) not in known:
                raise UserError(f"grid.{option}={getattr(self, option)}: choose one of {', '.join(known)}")
        if self.windows < 1:
            raise UserError(f"grid.windows={self.windows}: give at least 1")
        uniform = [] if self.budget_uniform is None else [(self.budget_uniform, self.group_size)]
        for width in [*uniform, *self.widths]:
            self.grid(width)

    @property
    def widths(self) -> list[Width]:
        """What there is to choose among."""
        return list(product(self.choices, self.group_sizes or [self.group_size]))

    def fitting(self, columns: int) -> list[Width]:
        """The widths of a linear: those whose groups are whole, where there are any."""
        return [width for width in self.widths if columns % width[1] == 0] or self.widths

    @property
    def bits(self) -> float:
        """Of a uniform grid that is as large, or of most linears' codes; until they are known, of the widest choice."""
        if self.budget_uniform is not None:
            return self.budget_uniform
        allocated = [bits for bits, _ in self.allocated.values()]
        return max(self.choices, key=allocated.count) if allocated else max(self.choices)

    @property
    def needs_hessian(self) -> bool:
        """Until bits are known, whatever the method: costs are output errors. Then, only the `hessian` search does."""
        return not self.allocated or self.search == "hessian"

    @property
    def label(self) -> str:
        """What tables call it."""
        return "allocated"

    def at(self, place: Place) -> Grid | None:
        """The grid of one linear; None for embeddings. An output head that is asked for gets the most of the bits, and
        the first of the group sizes.

        The budget doesn't count it. Before bits are known blocks take turns among the choices: a checkpoint format must
        be able to hold any mix.
        """
        if place.head:
            return self.grid(max(self.fitting(place.columns), key=lambda width: width[0]))
        if place.block < 0:
            return None
        fitting = self.fitting(place.columns)
        return self.grid(self.allocated.get(place.name, fitting[place.block % len(fitting)]))

    def resolved(self, allocated: Mapping[str, Width]) -> "AllocatedGrid":
        """The answer, by a linear's full name."""
        sizes = [size for _, size in allocated.values()]
        usual = max(sizes, key=sizes.count, default=self.group_size)
        group_size = self.group_size if self.budget_uniform is not None else usual
        return replace(self, allocated=allocated, group_size=group_size)

    def grid(self, width: Width) -> IntGrid:
        """The grid of one width."""
        options: dict[str, Any] = {"search": self.search, "scale_dtype": self.scale_dtype}
        return IntGrid(*width, self.sym, **options)
