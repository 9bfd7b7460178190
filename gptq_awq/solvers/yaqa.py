"""YAQA (Tseng et al., arXiv 2505.22988): rounding with feedback among outputs, too, so that the end loss is kept.

To second order, errors E = W - Q of one linear raise the KL from the full-precision model by ½ tr(H_O E H Eᵀ), where
H = E[x xᵀ] is the input's covariance and H_O = E[g gᵀ] that of the end loss's gradients by the linear's outputs, taken
to be independent. GPTQ minimizes this for H_O = I, where rows of W are problems by themselves. With H_O = U D Uᵀ, U
unit upper triangular, it is a sum over rows: row t costs D_t (E_t + Σ_{r<t} U_rt E_r) H (…)ᵀ, so that its target is

    A_t = W_t + Σ_{r<t} U_rt E_r        rows r before t are rounded already (eq. 9 of the paper, by rows)

and it is rounded onto A_t as any row is, by the column sweep. Rows are taken in order of falling diag(H_O), which lets
many cheap rows make up for the errors of few dear ones, and in tiles whose rows don't see each other's errors. Ranges
are fitted to the targets of `FITTED` rows at a time, before the tiles among these take up each other's errors.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from gptq_awq.calibration.moments import Moments
from gptq_awq.grids.arithmetic import Params
from gptq_awq.grids.base import Grid, QuantizedWeight
from gptq_awq.numerics.linalg import NotPositiveDefiniteError, damped
from gptq_awq.solvers.base import Solution
from gptq_awq.solvers.gptq import GPTQ, Rounding
from gptq_awq.solvers.refine import refined

FITTED = 64
"""Rows whose ranges are fitted together, at least: to targets that have taken up the errors of all rows before them."""


@dataclass(frozen=True)
class TwoSided:
    """GPTQ, or one of the solvers that start its sweep elsewhere, with feedback from row to row.

    Attributes:
        solver: the solver; its `target` is the weight W that rows start from.
        curvature: H_O, as its diagonal blocks below each other: (out, n), n the number of rows in a block. Rows of
            different blocks don't see each other's errors.
        tile: number of rows that are rounded together.
        damping: fraction of mean(diag H_O) that is added to the diagonal.
    """

    solver: GPTQ
    curvature: Float[Tensor, "out n"]
    tile: int
    damping: float

    @property
    def name(self) -> str:
        """Name of the solver in the ledger."""
        return self.solver.name

    @property
    def needs_hessian(self) -> bool:
        """Whether the solver needs the moments of the input: it does."""
        return True

    @property
    def needs_cross(self) -> bool:
        """Whether the solver needs the cross-covariance with full precision's inputs."""
        return self.solver.needs_cross

    def solve(self, weight: Float[Tensor, "out in"], moments: Moments | None, grid: Grid) -> Solution:
        """Quantize one weight by the column sweep, whose blocks of columns are rounded tile by tile of rows.

        Raises:
            NotPositiveDefiniteError: H could not be factored and no fallback is declared.
            ValueError: no moments are given, or the grid fits rows together.
        """
        if moments is None or not grid.rows_independent:
            raise ValueError("feedback among rows needs moments, and a grid that fits each row by itself")
        grid = grid.for_weights([weight])
        try:
            factor, columns, damping = moments.inverse_factor(self.solver.damping, self.solver.act_order, grid.unit)
        except NotPositiveDefiniteError:
            return self.solver.solve(weight, moments, grid)  # which raises too, or falls back and says so
        start = self.solver.target(weight.clone(), moments, factor, columns).masked_fill_(moments.dead(), 0)
        sweep = GPTQ(**{each.name: getattr(self.solver, each.name) for each in fields(GPTQ) if each.init})
        sweep = replace(sweep, refine=0)  # it follows here, tile by tile
        hessian = damped(moments.hessian, damping) if self.solver.refine and grid.unit == 1 else None
        parts, order = [], []
        for rows, U in self._blocks():
            W = start[rows]
            E = torch.zeros_like(W)
            for first in range(0, len(rows), max(self.tile, FITTED)):
                part = slice(first, first + max(self.tile, FITTED))
                target = W[part] + U[:first, part].T @ E[:first]
                feedback = _RowFeedback(target if columns is None else target[:, columns], U[part, part], self.tile)
                rounded = sweep.solve_together([target], [moments], grid, feedback.around)[0]
                if hessian is None:
                    E[part] = W[part] - rounded.quantized.dequantize()
                else:
                    rounded = self._refined(rounded, W, U, E, first, hessian)
                parts.append(rounded)
            order.append(rows)
        quantized = QuantizedWeight.concat_rows([part.quantized for part in parts])
        return replace(parts[0], quantized=quantized.rows(torch.argsort(torch.cat(order))))

    def _refined(
        self, rounded: Solution, W: Tensor, U: Tensor, E: Tensor, first: int, hessian: Float[Tensor, "in in"]
    ) -> Solution:
        """Refine the rows from `first` on tile by tile towards A_t, and enter into E what later tiles take up."""
        tiles = []
        for own in torch.arange(len(rounded.quantized.codes)).split(self.tile):
            rows = slice(first + int(own[0]), first + int(own[-1]) + 1)
            target = W[rows] + U[: rows.start, rows].T @ E[: rows.start]
            tiles.append(refined(rounded.quantized.rows(own), target, hessian, self.solver.refine))
            E[rows] = W[rows] - tiles[-1].dequantize()
        return replace(rounded, quantized=QuantizedWeight.concat_rows(tiles))

    def _blocks(self) -> Iterator[tuple[Int[Tensor, "rows"], Float[Tensor, "rows rows"]]]:
        """Rows of each block in the order of rounding, and the factor U of their part of H_O."""
        out, n = self.curvature.shape
        for first in range(0, out, n):
            H = self.curvature[first : first + n, : min(n, out - first)]
            order = torch.argsort(H.diagonal(), descending=True)
            yield first + order, unit_upper_factor(H[order][:, order], self.damping)


class _RowFeedback:
    """Feedback from tile to tile of some rows, within the rounding of each block of columns.

    Args:
        start: the weight that the sweep starts from, with rows and columns in the order of rounding.
        factor: U of these rows.
        tile: number of rows in a tile.
    """

    def __init__(self, start: Float[Tensor, "out in"], factor: Float[Tensor, "out out"], tile: int) -> None:
        self._start, self._factor, self._tile, self._column = start, factor, tile, 0

    def around(self, rounding: Rounding) -> Rounding:
        """A rounding of all rows, tile by tile, by one that rounds some; for blocks of columns from left to right."""

        def rounded(W: Tensor, U: Tensor, grid: Grid, params: Params, codes: Tensor, errors: Tensor) -> None:
            wanted = self._start[:, self._column : self._column + W.shape[2]]
            self._column += W.shape[2]
            E = torch.empty_like(wanted)
            for first in range(0, len(wanted), self._tile):
                tile = slice(first, first + self._tile)
                target = W[:, tile]
                target[0] += self._factor[:first, tile].T @ E[:first]
                moved = wanted[tile] - target[0]
                own = (params[0][:, tile], params[1][:, tile])
                rounding(target, U, grid, own, codes[:, tile], errors[:, tile])
                # The sweep leaves target - errors U on the grid, so that the error needs no decoding.
                E[tile] = moved + errors[0, tile] @ U[0]

        return rounded


def unit_upper_factor(H: Float[Tensor, "n n"], damping: float) -> Float[Tensor, "n n"]:
    """U of H + damping · mean(diag H) · I = U D Uᵀ, unit upper triangular; I where H is zero."""
    mean = H.diagonal().mean()
    if mean == 0:
        return torch.eye(len(H), dtype=H.dtype, device=H.device)
    damped = H.flip(0, 1)
    damped.diagonal().add_(damping * mean)
    factor, failed = torch.linalg.cholesky_ex(damped)
    if failed:  # hardly damped at all
        factor = torch.linalg.cholesky(damped.double())
    factor = factor.flip(0, 1)
    return (factor / factor.diagonal()).to(H.dtype)
