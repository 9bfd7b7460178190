"""A grid, or a mix, without the linears that stay in full precision: those of a list, or the most sensitive ones.

Where the most sensitive ones are asked for, the grid holds their share of the weights and, once
`gptq_awq.allocation.protect` has found them between preflight and quantization, their names.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from gptq_awq.grids.base import Grid, GridChoice, Place
from gptq_awq.grids.per_layer import matches

AUTO = "auto"


@dataclass(frozen=True)
class ProtectedGrid:
    """A mix that leaves some of another choice's linears in full precision.

    Attributes:
        grid: grid of all others.
        protect: patterns on full names (globs, or `re:` and a regular expression); or "auto", before names are chosen.
        share: largest share of the weights of the blocks' linears that "auto" keeps.
    """

    grid: GridChoice
    protect: Sequence[str] | Literal["auto"]
    share: float = 0.02

    @property
    def undecided(self) -> bool:
        """Whether the linears are still to be chosen."""
        return self.protect == AUTO

    def keeping(self, names: Iterable[str]) -> "ProtectedGrid":
        """This grid with chosen linears protected, by their full names."""
        return replace(self, protect=tuple(names))

    @property
    def bits(self) -> float:
        """Stored bits of most weights' codes."""
        return self.grid.bits

    @property
    def group_size(self) -> int:
        """Group size of most weights."""
        return self.grid.group_size

    @property
    def sym(self) -> bool | None:
        """Whether most grids are symmetric; None where that means nothing."""
        return getattr(self.grid, "sym", None)

    @property
    def needs_hessian(self) -> bool:
        """True before linears are chosen, by what rounding them costs; afterwards what the grid says."""
        return self.undecided or self.grid.needs_hessian

    @property
    def label(self) -> str:
        """Name of the grid in tables."""
        return self.grid.label

    def at(self, place: Place) -> Grid | None:
        """Grid of the weight at a place; None for one that is protected."""
        if not self.undecided and any(matches(pattern, place.name, "protect") for pattern in self.protect):
            return None
        return self.grid.at(place)

    def unmatched(self, places: Iterable[Place]) -> list[str]:
        """Patterns that match no weight of the model, and what the grid's own options name in vain."""
        places = list(places)
        patterns = () if self.undecided else self.protect
        wrong = [f"protect={p}" for p in patterns if not any(matches(p, place.name, "protect") for place in places)]
        return wrong + getattr(self.grid, "unmatched", lambda _: [])(places)
