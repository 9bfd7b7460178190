"""Which linears are solved together, and by which rank.

Rows of a weight are problems by themselves, given the factor of its input's H. So linears of one site are solved below
each other, experts of one shape side by side, each with its own H, and of a site that all ranks know each rank solves
some rows. Experts go to ranks as a whole: there are many, and each has an H to factor.
"""

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from gptq_awq.calibration.moments import Moments
from gptq_awq.grids.base import Grid
from gptq_awq.models.linear import Site
from gptq_awq.numerics.distributed import Ranks
from gptq_awq.solvers.base import Rowwise, Solver

T = TypeVar("T")
STACK_BYTES = 2**26
"""Of weights that are put below each other, which takes a copy; or as much as their H takes."""
BATCH_BYTES = 2**28
"""Of the factors and weights of several H."""


@dataclass(frozen=True)
class RowSlice:
    """Some rows of a linear, which are solved by themselves or with others.

    Attributes:
        name: of the linear within the block.
        site: it is of.
        moments: of its input; of no token where nothing is known of it; None where nothing is calibrated.
        solver: that lands it.
        grid: that the solver fits.
        columns: of the linear.
        rows: first one, and one past the last.
    """

    name: str
    site: Site
    moments: Moments | None
    solver: Solver
    grid: Grid
    columns: int
    rows: tuple[int, int]

    @property
    def known(self) -> Moments | None:
        """The moments, if they are of any token."""
        return self.moments if self.moments is not None and self.moments.tokens else None

    @property
    def count(self) -> int:
        """Of rows."""
        return self.rows[1] - self.rows[0]

    @property
    def independent(self) -> bool:
        """Whether the rows can be solved apart from the linear's other ones."""
        return isinstance(self.solver, Rowwise) and self.grid.rows_independent

    @property
    def input(self) -> Hashable:
        """The same for pieces that can be put below each other."""
        if self.known is None or not (self.independent and self.solver.needs_hessian):
            return self.name
        return id(self.known.hessian), id(self.solver), self.grid


def shared(linears: Sequence[RowSlice], ranks: Ranks) -> list[RowSlice]:
    """Those pieces of some whole linears that this rank solves."""
    several = len({piece.site.expert for piece in linears} - {None}) > 1
    whole, split = [], []
    for group in _groups(linears, lambda piece: piece.input):
        (whole if not group[0].independent or (several and group[0].site.expert is not None) else split).append(group)
    taken = [whole[i] for i in ranks.share([_cost(group) for group in whole])]
    return [piece for group in (*taken, *(_rows_of(group, ranks) for group in split)) for piece in group]


def _cost(pieces: Sequence[RowSlice]) -> float:
    """Multiplications of one H's factor and sweep."""
    width = pieces[0].columns
    return width**3 / 3 + width**2 * _rows(pieces)


def _rows(pieces: Sequence[RowSlice]) -> int:
    return sum(piece.count for piece in pieces)


def _rows_of(pieces: Sequence[RowSlice], ranks: Ranks) -> list[RowSlice]:
    """This rank's part of the rows of all pieces, one below the other."""
    start, parts = 0, []
    first, end = (_rows(pieces) * rank // ranks.size for rank in (ranks.rank, ranks.rank + 1))
    for piece in pieces:
        a, b = max(first - start, 0), min(end - start, piece.count)
        if a < b:
            parts.append(replace(piece, rows=(a, b)))
        start += piece.count
    return parts


def batches(pieces: Sequence[RowSlice]) -> list[list[RowSlice]]:
    """Pieces that are solved together: of one grid, and as many rows for each H."""
    alike: dict[Hashable, list[list[RowSlice]]] = {}
    for group in _groups(pieces, lambda piece: piece.input):
        first, limit = group[0], max(STACK_BYTES, 4 * group[0].columns ** 2)
        for number, stack in enumerate(_filled([[piece] for piece in group], limit)):
            # `number`: one stack of an input at a time.
            shape = (number, _rows(stack), first.columns, first.grid, id(first.solver))
            alike.setdefault(first.name if first.input == first.name else shape, []).append(stack)
    return [batch for stacks in alike.values() for batch in _filled(stacks, BATCH_BYTES, factors=True)]


def _filled(parts: Sequence[Sequence[RowSlice]], limit: int, factors: bool = False) -> list[list[RowSlice]]:
    """As many parts in one as the limit of bytes allows, of their weights and, if asked for, a factor for each part."""
    filled, taken = [], 0
    for part in parts:
        size = 4 * part[0].columns * (_rows(part) + factors * part[0].columns)
        if filled and taken + size <= limit:
            filled[-1] += part
            taken += size
        else:
            filled.append(list(part))
            taken = size
    return filled


def _groups(items: Iterable[T], key: Callable[[T], Hashable]) -> list[list[T]]:
    """Items of one key, in the order that keys appear."""
    groups: dict[Hashable, list[T]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return list(groups.values())
