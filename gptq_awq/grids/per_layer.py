"""Integer grids of different widths in one model: bits by the linear's name and by the block it is in."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from gptq_awq.errors import UserError
from gptq_awq.grids.base import Grid, Place
from gptq_awq.grids.integer import IntGrid


@dataclass(frozen=True)
class PerLayerGrid:
    """`IntGrid`s that differ in their bits.

    Attributes:
        bits: of linears that nothing else names.
        group_size: columns that share a scale; -1 for the whole row.
        sym: see `IntGrid`, as are search and scale_dtype.
        modules: last part of a linear's name (`down_proj`) → bits.
        blocks: number of a block → bits, before `modules`; negative ones count from the last.

    Raises:
        UserError: bits that no integer grid has, a block that is no number.
    """

    bits: int = 4
    group_size: int = 64
    sym: bool = False
    search: str = "minmax"
    scale_dtype: str = "float16"
    modules: Mapping[str, int] = field(default_factory=dict)
    blocks: Mapping[str | int, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for bits in (self.bits, *self.modules.values(), *self.blocks.values()):
            self._grid(bits)
        self._numbered()

    @property
    def needs_hessian(self) -> bool:
        """Only the `hessian` range search does."""
        return self.search == "hessian"

    @property
    def label(self) -> str:
        """What tables call it."""
        return "per_layer"

    def at(self, place: Place) -> Grid | None:
        """The grid of one linear; None for embeddings and the output head."""
        if place.block < 0:
            return None
        blocks = self._numbered()
        of_module = self.modules.get(place.name.rsplit(".", 1)[-1], self.bits)
        return self._grid(blocks.get(place.block, blocks.get(place.block - place.blocks, of_module)))

    def unmatched(self, places: Iterable[Place]) -> list[str]:
        """Entries of `modules` and `blocks` that no linear of a model goes by: misspelt, or another model's."""
        inner = [place for place in places if place.block >= 0]
        names = {place.name.rsplit(".", 1)[-1] for place in inner}
        numbers = {n for place in inner for n in (place.block, place.block - place.blocks)}
        wrong = [f"grid.modules.{name}" for name in self.modules if name not in names]
        return wrong + [f"grid.blocks.{number}" for number in self._numbered() if number not in numbers]

    def _grid(self, bits: int) -> IntGrid:
        return IntGrid(bits, self.group_size, self.sym, self.search, self.scale_dtype)  # pyright: ignore[reportArgumentType]

    def _numbered(self) -> dict[int, int]:
        try:
            return {int(number): bits for number, bits in self.blocks.items()}
        except ValueError as error:
            raise UserError(f"grid.blocks={dict(self.blocks)}: give a block's number") from error
