"""Integer grids of different bits in one model, set by a linear's full name, by its block or by its kind.

Patterns match full names: globs such as `model.layers.0.*`, or `re:` and a regular expression; the first match counts.
Patterns take precedence over a block's number, and that over the kind, the last part of a name.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import field
from fnmatch import fnmatchcase
from typing import Any

from gptq_awq.errors import UserError
from gptq_awq.grids.base import Grid, Place
from gptq_awq.grids.integer import IntGrid
from gptq_awq.runtime.options import Bits, Dtype, GroupSize, Search, checked_dataclass

Override = int | Mapping[str, Any]
"""Bits, or a map of any of `FIELDS`."""
FIELDS = ("bits", "group_size", "sym", "search")


@checked_dataclass
class PerLayerGrid:
    """A mix of `IntGrid`s that differ in their bits.

    Attributes:
        bits: bits of linears that none of the maps matches.
        group_size: columns that share a scale; -1 for the whole row.
        sym: see `IntGrid`, as are search and scale_dtype.
        modules: last part of a linear's name (`down_proj`) → bits.
        blocks: number of a block → bits, with precedence over `modules`; negative numbers count from the last.
        overrides: pattern on a linear's full name → bits, or a map of bits, group_size, sym, search; first of all.

    Raises:
        UserError: bits or group sizes that no integer grid has, a block that is no number, an invalid pattern,
            or an unknown option.
    """

    bits: Bits = 4
    group_size: GroupSize = 64
    sym: bool = False
    search: Search = "minmax"
    scale_dtype: Dtype = "float16"
    modules: Mapping[str, Bits] = field(default_factory=dict)
    blocks: Mapping[str | int, Bits] = field(default_factory=dict)
    overrides: Mapping[str, Override] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._numbered()
        for pattern, override in self.overrides.items():
            matches(pattern, "")
            self._overridden(pattern, override)

    @property
    def needs_hessian(self) -> bool:
        """Whether any of its grids searches ranges by the Hessian."""
        maps = [override for override in self.overrides.values() if isinstance(override, Mapping)]
        return self.search == "hessian" or any(override.get("search") == "hessian" for override in maps)

    @property
    def label(self) -> str:
        """Name of the grid in tables."""
        return "per_layer"

    def at(self, place: Place) -> Grid | None:
        """Grid of the weight at a place; None for embeddings and for output heads without `place.head`."""
        if place.block < 0 and not place.head:
            return None
        for pattern, override in self.overrides.items():
            if matches(pattern, place.name):
                return self._overridden(pattern, override)
        blocks = {} if place.head else self._numbered()
        of_module = self.modules.get(place.name.rsplit(".", 1)[-1], self.bits)
        return self._grid(blocks.get(place.block, blocks.get(place.block - place.blocks, of_module)))

    def unmatched(self, places: Iterable[Place]) -> list[str]:
        """Entries of the three maps that match no linear of the model: misspelt, or meant for another model.

        A pattern counts as unmatched where earlier patterns take all of its matches.
        """
        inner = [place for place in places if place.block >= 0 or place.head]
        names = {place.name.rsplit(".", 1)[-1] for place in inner}
        numbers = {n for p in inner if not p.head for n in (p.block, p.block - p.blocks)}
        firsts = {next((p for p in self.overrides if matches(p, place.name)), None) for place in inner}
        wrong = [f"grid.overrides.{pattern}" for pattern in self.overrides if pattern not in firsts]
        wrong += [f"grid.modules.{name}" for name in self.modules if name not in names]
        return wrong + [f"grid.blocks.{number}" for number in self._numbered() if number not in numbers]

    def _overridden(self, pattern: str, override: Override) -> IntGrid:
        if not isinstance(override, Mapping):
            return self._grid(override)
        if wrong := [key for key in override if key not in FIELDS]:
            raise UserError(f"grid.overrides.{pattern}.{wrong[0]}: choose among {', '.join(FIELDS)}")
        return self._grid(**{"bits": self.bits} | dict(override))

    def _grid(self, bits: int, **other: Any) -> IntGrid:
        options = {"group_size": self.group_size, "sym": self.sym, "search": self.search} | other
        return IntGrid(bits, scale_dtype=self.scale_dtype, **options)  # pyright: ignore[reportArgumentType]

    def _numbered(self) -> dict[int, int]:
        try:
            return {int(number): bits for number, bits in self.blocks.items()}
        except ValueError as error:
            raise UserError(f"grid.blocks={dict(self.blocks)}: give a block's number") from error


def matches(pattern: str, name: str, option: str = "grid.overrides") -> bool:
    """Whether a pattern of an option, a glob or `re:` and a regular expression, matches a whole name.

    Raises:
        UserError: the regular expression is invalid.
    """
    if not pattern.startswith("re:"):
        return fnmatchcase(name, pattern)
    try:
        return re.fullmatch(pattern.removeprefix("re:"), name) is not None
    except re.error as error:
        raise UserError(f"{option}.{pattern}: {error}") from error
