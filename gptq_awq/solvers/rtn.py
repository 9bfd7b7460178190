"""RTN: every weight to its nearest neighbour on the grid. The baseline of every paper; needs no data."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from gptq_awq.grids.base import Grid, QuantizedWeight, group_of_columns, group_spans
from gptq_awq.linalg import quadratic
from gptq_awq.moments import Moments
from gptq_awq.solvers.base import Solution


@dataclass(frozen=True)
class RTN:
    """Round to nearest."""

    name: str = "rtn"
    needs_hessian: bool = False

    def solve(self, weight: Float[Tensor, "out in"], moments: Moments | None, grid: Grid) -> Solution:
        """Fit and round each group by itself; moments serve the grid's range search and the loss only."""
        columns = weight.shape[1]
        codes, values, scales, zeros = [], [], [], []
        for a, b in group_spans(columns, grid.group_size):
            group = weight[:, a:b]
            params = grid.fit(group, moments.hessian[a:b, a:b] if moments and grid.needs_hessian else None)
            codes.append(grid.encode(group, params))
            values.append(grid.decode(codes[-1], params))
            scales.append(params[0])
            zeros.append(params[1])
        loss = quadratic(weight - torch.cat(values, 1), moments.hessian) / 2 if moments else None
        quantized = QuantizedWeight(
            codes=torch.cat(codes, 1).to(torch.uint8),
            scales=torch.cat(scales, 1),
            zeros=torch.cat(zeros, 1),
            group_of_column=group_of_columns(columns, grid.group_size),
            grid=grid,
            loss=loss,
        )
        return Solution(quantized, algorithm=self.name)
