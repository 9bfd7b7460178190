"""llama.cpp's formats, one for each weight of a model, so that its GGUF file has a given size: `grid=gguf budget=90MB`.

The grid holds the budget and the types to choose among and, once `gptq_awq.allocation` has found them between preflight
and quantization, the type of each weight. The embedding and an output head count, and get a type, too.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import field, replace
from typing import Any, Literal

from gptq_awq.errors import UserError
from gptq_awq.grids.allocated import stored_bits
from gptq_awq.grids.base import Grid, Place
from gptq_awq.grids.mix import BASE, LlamaMix, llama_grid
from gptq_awq.runtime.memory import parse_bytes
from gptq_awq.runtime.options import PositiveInt, Search, checked_dataclass

GGUFType = Literal[
    "q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "iq4_nl", "mxfp4", "iq4_xs",
    "iq3_s", "iq3_xxs", "iq2_s", "iq2_xs", "iq2_xxs",
]  # fmt: skip
"""llama.cpp's types that have a grid here."""


@checked_dataclass
class GGUFGrid:
    """A choice among llama.cpp's types for each weight, whose file fits a budget at the least predicted cost.

    Attributes:
        budget: size of the file, such as 90MB; or bits per weight, on average over all weights that get a type; or one
            of llama.cpp's file types, such as q4_k_m, whose file is to be met.
        types: types to choose among; those whose blocks don't divide a weight's columns are left out for it.
        tie: see `AllocatedGrid`, as are sensitivity, rounding and windows.
        search: how ranges are chosen: minmax, mse or hessian.
        allocated: type by a weight's full name; empty before allocation.

    Raises:
        UserError: a budget that is neither a size, nor bits, nor a file type; no types.
    """

    budget: str | float = "q4_k_m"
    types: Sequence[GGUFType] = ("q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "iq4_nl", "q5_0", "q5_1", "q8_0")
    tie: Literal["linear", "site", "model"] = "linear"
    sensitivity: Literal["fisher", "error", "kl"] = "fisher"
    rounding: Literal["solver", "rtn"] = "solver"
    windows: PositiveInt = 8
    search: Search = "minmax"
    allocated: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.types:
            raise UserError("grid.types=[]: give some types to choose among, such as [q4_k,q5_k,q6_k,q8_0]")
        if self._bits_per_weight is None and self._bytes is None and self._file_type is None:
            raise UserError(
                f"budget={self.budget}: give the file's size, such as 90MB, bits per weight, such as 4.5, or one of "
                f"llama.cpp's file types: {', '.join(BASE)}"
            )

    @property
    def widths(self) -> list[str]:
        """All types to choose among."""
        return list(self.types)

    @property
    def bits(self) -> float:
        """Bits in tables: those of most weights; before allocation, of the widest type."""
        chosen = list(self.allocated.values()) or sorted(self.types, key=lambda kind: llama_grid(kind).bits)[-1:]
        return llama_grid(Counter(chosen).most_common(1)[0][0]).bits

    @property
    def group_size(self) -> int:
        """Group size in tables: that of most weights."""
        chosen = list(self.allocated.values()) or self.widths
        return llama_grid(max(chosen, key=chosen.count)).group_size

    @property
    def needs_hessian(self) -> bool:
        """True before allocation, whose costs are output errors; afterwards, for `search=hessian` only."""
        return not self.allocated or self.search == "hessian"

    @property
    def label(self) -> str:
        """Name of the grid in tables."""
        return f"gguf {self.budget}"

    def fitting(self, columns: int) -> list[str]:
        """Types whose blocks divide a weight's columns."""
        return [kind for kind in self.types if columns % llama_grid(kind).span == 0]

    def at(self, place: Place) -> Grid | None:
        """Grid of the weight at a place; None for weights outside of the blocks that no type fits.

        Before allocation, blocks take turns among the types, since a checkpoint format must be able to hold any mix.

        Raises:
            UserError: no type fits a weight in a block.
        """
        fitting = self.fitting(place.columns)
        outside = place.block < 0
        if not fitting and outside:
            return None
        if not fitting:
            raise UserError(
                f"grid.types={list(self.types)}: none divides the {place.columns} columns of {place.name}; "
                "add iq4_nl, q5_0 or q8_0, which need multiples of 32"
            )
        kind = self.allocated.get(place.name, fitting[place.block % len(fitting)])
        # Embeddings and heads have no Hessian, unless the solver is asked for (head=solve).
        search = "mse" if outside and not place.head and self.search != "minmax" else self.search
        return llama_grid(kind, search)

    def grid(self, width: str) -> Grid:
        """Grid of one type."""
        return llama_grid(width, self.search)

    def outside_grid(self, width: str) -> Grid:
        """Grid of one type for an embedding, which is rounded to nearest without a Hessian."""
        return llama_grid(width, "minmax" if self.search == "minmax" else "mse")

    def resolved(self, allocated: Mapping[str, str]) -> "GGUFGrid":
        """This grid with the types that were allocated, by a weight's full name, filled in."""
        return replace(self, allocated=dict(allocated))

    def name_of(self, width: str) -> str:
        """Name of a type in reports."""
        return width

    def facts_of(self, width: str) -> dict[str, Any]:
        """Facts of a weight's type for reports."""
        return {"type": width}

    @property
    def budget_option(self) -> str:
        """The budget as an option, for messages."""
        return f"budget={self.budget}"

    @property
    def counts_file(self) -> bool:
        """Whether the budget is of a whole file: the embedding and an output head count."""
        return True

    def budget_in_bits(self, places: Sequence[Place], rows: Mapping[str, int], order: int = 0, beside: int = 0) -> int:
        """Bits that all weights at these places may take together; `beside` bits of the file hold other things."""
        del order  # llama.cpp's groups are neighbouring columns
        if self._bytes is not None:
            return 8 * self._bytes - beside
        if self._bits_per_weight is not None:
            return int(self._bits_per_weight * sum(rows[place.name] * place.columns for place in places))
        mix = LlamaMix(self._file_type)  # pyright: ignore[reportArgumentType]
        return sum(stored_bits(mix.at(place), rows[place.name], place.columns) for place in places)

    @property
    def _file_type(self) -> str | None:
        name = str(self.budget).lower()
        return name if name in BASE else None

    @property
    def _bits_per_weight(self) -> float | None:
        try:
            return float(self.budget)
        except ValueError:
            return None

    @property
    def _bytes(self) -> int | None:
        try:
            return None if self._bits_per_weight is not None else parse_bytes(str(self.budget))
        except ValueError:
            return None
