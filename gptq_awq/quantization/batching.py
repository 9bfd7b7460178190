"""Batching of linears: which rows of which linears are solved together, and by which rank.

Given the factor of its input's H, each row of a weight is a problem by itself. So the linears of a site are stacked and
solved in one call; stacks of one shape, each with its own H (experts), are solved as one batch; and ranks split the
rows of a site that all of them have the moments of. Experts go to ranks as a whole: there are many, and each has an H
to factor.
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
"""Most bytes of float32 weights in one stack, which copies them; a stack may take as much as its H in any case."""
BATCH_BYTES = 2**28
"""Most bytes of the weights and factors of several stacks that are solved as one batch."""


@dataclass(frozen=True)
class RowSlice:
    """Some rows of one linear, with all that solving them takes.

    Attributes:
        name: name of the linear within its block.
        site: the site that the linear belongs to.
        moments: second moments of the site's input; of no token where none reached it; None without calibration.
        solver: solver that quantizes the rows.
        grid: grid that the solver fits to them.
        columns: number of columns of the linear.
        rows: first row, and one past the last.
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
        """The moments of the site's input, if any token reached it; else None."""
        return self.moments if self.moments is not None and self.moments.tokens else None

    @property
    def count(self) -> int:
        """Number of rows."""
        return self.rows[1] - self.rows[0]

    @property
    def independent(self) -> bool:
        """Whether solver and grid treat each row by itself, so that the linear's rows may be split."""
        return isinstance(self.solver, Rowwise) and self.grid.rows_independent

    @property
    def input(self) -> Hashable:
        """Key that row slices share if they may be stacked: same H, same solver, equal grid."""
        if self.known is None or not (self.independent and self.solver.needs_hessian):
            return self.name
        return id(self.known.hessian), id(self.solver), self.grid


def shared(linears: Sequence[RowSlice], ranks: Ranks) -> list[RowSlice]:
    """The row slices of some whole linears that this rank solves."""
    several = len({linear.site.expert for linear in linears} - {None}) > 1
    whole, split = [], []
    for group in _groups(linears, lambda linear: linear.input):
        (whole if not group[0].independent or (several and group[0].site.expert is not None) else split).append(group)
    own = [whole[i] for i in ranks.share([_cost(group) for group in whole])]
    own += [_split_rows(group, ranks) for group in split]
    return [row_slice for group in own for row_slice in group]


def _cost(stack: Sequence[RowSlice]) -> float:
    """Multiplications of factoring one H and of sweeping the columns of a stack of row slices."""
    width = stack[0].columns
    return width**3 / 3 + width**2 * _rows(stack)


def _rows(stack: Sequence[RowSlice]) -> int:
    return sum(row_slice.count for row_slice in stack)


def _split_rows(linears: Sequence[RowSlice], ranks: Ranks) -> list[RowSlice]:
    """This rank's equal share of the rows of some linears, counted through all of them in order."""
    start, own = 0, []
    first, end = (_rows(linears) * rank // ranks.size for rank in (ranks.rank, ranks.rank + 1))
    for linear in linears:
        a, b = max(first - start, 0), min(end - start, linear.count)
        if a < b:
            own.append(replace(linear, rows=(a, b)))
        start += linear.count
    return own


def batches(slices: Sequence[RowSlice]) -> list[list[RowSlice]]:
    """Row slices grouped into batches that are solved in one call: of one grid, with equally many rows for each H."""
    alike: dict[Hashable, list[list[RowSlice]]] = {}
    for group in _groups(slices, lambda row_slice: row_slice.input):
        first, limit = group[0], max(STACK_BYTES, 4 * group[0].columns ** 2)
        for number, stack in enumerate(_filled([[row_slice] for row_slice in group], limit)):
            # `number` keeps two stacks of one input out of the same batch.
            shape = (number, _rows(stack), first.columns, first.grid, id(first.solver))
            alike.setdefault(first.name if first.input == first.name else shape, []).append(stack)
    return [batch for stacks in alike.values() for batch in _filled(stacks, BATCH_BYTES, factors=True)]


def _filled(stacks: Sequence[Sequence[RowSlice]], limit: int, factors: bool = False) -> list[list[RowSlice]]:
    """Stacks joined, in order, up to `limit` bytes of float32 weights and, with `factors`, of one factor per stack."""
    filled, taken = [], 0
    for stack in stacks:
        size = 4 * stack[0].columns * (_rows(stack) + factors * stack[0].columns)
        if filled and taken + size <= limit:
            filled[-1] += stack
            taken += size
        else:
            filled.append(list(stack))
            taken = size
    return filled


def _groups(items: Iterable[T], key: Callable[[T], Hashable]) -> list[list[T]]:
    """Items grouped by `key`, groups in the order that their keys first appear."""
    groups: dict[Hashable, list[T]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return list(groups.values())
