"""RTN, round to nearest: every weight becomes its nearest grid point. The baseline of every paper; needs no data."""

from collections.abc import Sequence
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from gptq_awq.calibration.moments import Moments
from gptq_awq.grids.base import Grid, QuantizedWeight, fit_all, group_of_columns
from gptq_awq.numerics.linalg import quadratic
from gptq_awq.solvers.base import Solution


@dataclass(frozen=True)
class RTN:
    """RTN: round every weight to its nearest grid point, independently of all others."""

    name: str = "rtn"
    needs_hessian: bool = False
    needs_cross: bool = False

    def solve(self, weight: Float[Tensor, "out in"], moments: Moments | None, grid: Grid) -> Solution:
        """Fit and round each group independently; moments serve the grid's range search and the reported loss only."""
        grid = grid.for_weights([weight])
        fitted = fit_all(grid, weight, moments.hessian if moments else None)
        groups = group_of_columns(weight.shape[1], grid.group_size)
        params = fitted.per_column(groups)
        codes = grid.encode(weight, params)
        loss = quadratic(weight - grid.decode(codes, params), moments.hessian) / 2 if moments else None
        return Solution(QuantizedWeight.of(grid, codes, fitted, groups, loss), algorithm=self.name)

    def solve_together(
        self, weights: Sequence[Float[Tensor, "_ in"]], moments: Sequence[Moments | None], grid: Grid
    ) -> list[Solution]:
        """Quantize several weights one after the other, as rounding to nearest shares no work between them."""
        return [self.solve(weight, own, grid) for weight, own in zip(weights, moments, strict=True)]
