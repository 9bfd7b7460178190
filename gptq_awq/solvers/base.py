"""The solver protocol: quantize one linear's weight onto a grid, given the second moments of its input.

A solver is a frozen dataclass with `name`, `needs_hessian` and `solve`. One that corrects drift also has
`needs_cross=True`; one that treats the rows of a weight independently may define `solve_together`.
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
    """Result of solving one linear: its quantized weight, and for the ledger how it was found.

    Attributes:
        quantized: codes, scales and zeros of the weight.
        algorithm: name of the algorithm that actually ran: the solver's, or its declared fallback's.
        damping: λ with which the Hessian factored, a fraction of its mean diagonal; None where none was factored.
        fallback: reason for using another algorithm or damping than requested; None where neither was changed.
        ridge: what damping added to the Hessian's diagonal, where the loss is of the weight that was given; None where
            it is of another that the solver started from, or nothing was added.
    """

    quantized: QuantizedWeight
    algorithm: str
    damping: float | None = None
    fallback: str | None = None
    ridge: float | None = None


@runtime_checkable
class Solver(Protocol):
    """An algorithm that quantizes one linear's weight onto a grid."""

    @property
    def name(self) -> str:
        """Name of the algorithm in the ledger."""
        ...

    @property
    def needs_hessian(self) -> bool:
        """Whether `solve` needs calibration statistics: the moments of the linear's input."""
        ...

    @property
    def needs_cross(self) -> bool:
        """Whether `solve` needs `moments.cross`, the cross-covariance of quantized and full-precision inputs.

        Gathering it runs the full-precision model beside the quantized one: twice the forward passes.
        """
        ...

    def solve(self, weight: Float[Tensor, "out in"], moments: Moments | None, grid: Grid) -> Solution:
        """Quantize one weight (float32) onto the grid, given the moments of its input."""
        ...


@runtime_checkable
class Rowwise(Solver, Protocol):
    """A solver that treats a weight's rows independently, given the Hessian of its input.

    Several linears are therefore solved in one call, and ranks split the rows of one linear.
    """

    def solve_together(
        self, weights: Sequence[Float[Tensor, "_ in"]], moments: Sequence[Moments | None], grid: Grid
    ) -> list[Solution]:
        """Quantize several weights of one width in one call, and return their solutions in the same order.

        Weights that read one input share one `Moments` object; each input's weights have equally many rows in total.
        """
        ...


@runtime_checkable
class Coupling(Solver, Protocol):
    """A solver that can take account of what the end loss feels of each output, which couples a weight's rows."""

    def two_sided(self, curvature: Float[Tensor, "out n"], tile: int, damping: float) -> Solver:
        """This solver with feedback among rows, for one weight; see `solvers.yaqa.TwoSided`."""
        ...
