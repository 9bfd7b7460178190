"""What a solver is, and what it answers.

A solver lands one linear's weight on a grid: a frozen dataclass with `name`, `needs_hessian` and `solve`, and
`needs_cross` if it is true. One whose rows don't depend on each other may have a `solve_together`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor

from gptq_awq.calibration.moments import Moments
from gptq_awq.grids.base import Grid, QuantizedWeight


@dataclass(frozen=True)
class Solution:
    """A solved linear and how it was solved, for the ledger.

    Attributes:
        quantized: the weight on its grid.
        algorithm: what actually ran: the solver's name, or that of its declared fallback.
        damping: the damping that made the Hessian factor; None where none was needed.
        fallback: why another algorithm or damping than the requested one was used; None if it wasn't.
    """

    quantized: QuantizedWeight
    algorithm: str
    damping: float | None = None
    fallback: str | None = None


@runtime_checkable
class Solver(Protocol):
    """How one linear's weight lands on the grid."""

    @property
    def name(self) -> str:
        """The algorithm, as the ledger names it."""
        ...

    @property
    def needs_hessian(self) -> bool:
        """Whether calibration statistics must be gathered for `solve`."""
        ...

    @property
    def needs_cross(self) -> bool:
        """Whether `solve` must know how its inputs relate to full precision's: `moments.cross`.

        The pipeline runs the full-precision model beside the quantized one then, for twice the forwards.
        """
        ...

    def solve(self, weight: Float[Tensor, "out in"], moments: Moments | None, grid: Grid) -> Solution:
        """Quantize one weight (float32), given the statistics of its input."""
        ...


@runtime_checkable
class Rowwise(Solver, Protocol):
    """A solver to which each row of a weight is a problem by itself, given its input's moments.

    Several linears are solved together then, and ranks share the rows of one.
    """

    def solve_together(
        self, weights: Sequence[Float[Tensor, "_ in"]], moments: Sequence[Moments | None], grid: Grid
    ) -> list[Solution]:
        """Quantize some weights: those of one input are given the same moments; inputs have equally many rows."""
        ...
