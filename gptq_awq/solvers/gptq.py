"""GPTQ (Frantar et al., arXiv 2210.17323): round column by column, let later columns absorb the error.

With U the upper Cholesky factor of (H + λ mean(diag H) I)⁻¹, for columns i = 1…in:

    q_i = quant(w_i)                              nearest point on the grid
    e_i = (w_i - q_i) / U_ii                      the error in units of what it costs
    W_:,j ← W_:,j - e_i U_ij      for j > i       optimal update of the columns not yet rounded (eq. 2)

Updates inside a block of `block_size` columns are immediate, those beyond it are applied once per block
(sec. 3.3, lazy batch updates). A group's range is fitted when its first column's turn comes, to the weights as
the last lazy update left them: the original code's choice, so that results equal its own.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from gptq_awq.errors import UserError
from gptq_awq.grids.base import Grid, Params, QuantizedWeight, group_of_columns, group_starts
from gptq_awq.kernels import sweep_affine
from gptq_awq.linalg import NotPositiveDefiniteError
from gptq_awq.moments import Moments
from gptq_awq.solvers.base import Solution
from gptq_awq.solvers.rtn import RTN

GroupParams = Callable[[int, Tensor], Params]
"""(group, W as of the last lazy update) → its scale and zero."""


@dataclass(frozen=True)
class GPTQ:
    """Hessian-based error feedback.

    Attributes:
        act_order: round columns in order of falling diag(H). Without `static_groups`, groups are made of
            columns adjacent in that order, and the checkpoint must store each column's group.
        static_groups: fit all groups before rounding, to the original weights, in natural column order.
        damping: λ, a fraction of the mean diagonal of H (percdamp); raised tenfold while H won't factor.
        block_size: columns per lazy update.
        fallback: what to do when no damping helps: "none" fails the run, "rtn" rounds this linear to nearest
            and says so in the ledger.
    """

    act_order: bool = False
    static_groups: bool = False
    damping: float = 0.01
    block_size: int = 128
    fallback: str = "none"
    name: str = "gptq"
    needs_hessian: bool = True

    def __post_init__(self) -> None:
        if not self.damping >= 0:
            raise UserError(f"method.solver.damping={self.damping}: give a fraction of the mean diagonal, such as 0.01")
        if self.block_size < 1:
            raise UserError(f"method.solver.block_size={self.block_size}: give a number of columns, such as 128")
        if self.fallback not in ("none", "rtn"):
            raise UserError(f"method.solver.fallback={self.fallback}: choose none or rtn")

    def solve(self, weight: Float[Tensor, "out in"], moments: Moments | None, grid: Grid) -> Solution:
        """Quantize one weight.

        Raises:
            NotPositiveDefiniteError: H could not be factored and no fallback is declared.
        """
        if moments is None:
            raise ValueError("GPTQ needs the moments of the layer's input")
        W = weight.clone()
        # 1. Columns that never see an input cannot matter.
        W[:, moments.dead()] = 0
        # 2. Factor the inverse Hessian, in the order that columns are rounded in.
        try:
            U, order, damping = moments.inverse_factor(self.damping, self.act_order)
        except NotPositiveDefiniteError as error:
            if self.fallback == "none":
                raise
            return Solution(RTN().solve(weight, moments, grid).quantized, "rtn", fallback=str(error))
        # 3. Say how a group of (permuted) columns gets its scale.
        hessian = moments.hessian if grid.needs_hessian else None
        column_group = group_of_columns(W.shape[1], grid.group_size)
        if self.static_groups:
            fitted = _fit_all(W, hessian, grid)
            params_of: GroupParams = lambda group, _: fitted[group]  # noqa: E731
            swept_group = column_group if order is None else column_group[order.cpu()]
        else:
            permuted_hessian = hessian if hessian is None or order is None else hessian[order][:, order]
            params_of = _fit_in_turn(permuted_hessian, column_group, grid)
            swept_group = column_group
        # 4. Round, column by column.
        if order is not None:
            W = W[:, order]
        codes, params, loss = sweep(W, U, grid, swept_group, params_of, self.block_size)
        # 5. Back to the layer's own column order.
        if order is not None:
            inverse = torch.argsort(order)
            codes, swept_group = codes[:, inverse], swept_group[inverse.cpu()]
        scales, zeros = (torch.cat([params[g][k] for g in sorted(params)], dim=1) for k in (0, 1))
        quantized = QuantizedWeight(codes.to(torch.uint8), scales, zeros, swept_group, grid, loss)
        raised = f"damping raised from {self.damping:g} to {damping:g}" if damping != self.damping else None
        return Solution(quantized, self.name, damping, raised)


def sweep(
    W: Float[Tensor, "out in"],
    U: Float[Tensor, "in in"],
    grid: Grid,
    group_of_column: Tensor,
    params_of: GroupParams,
    block_size: int,
) -> tuple[Float[Tensor, "out in"], dict[int, Params], float]:
    """The blocked column sweep. Changes W in place.

    Returns:
        Codes; the parameters of every group; the loss ½ Σ (w_i - q_i)² / U_ii².
    """
    columns, groups = W.shape[1], group_of_column.tolist()
    codes, params, loss = torch.empty_like(W), {}, 0.0
    round_columns = _round_compiled if grid.max_code is not None and W.device.type == "cpu" else _round_plain
    for i1 in range(0, columns, block_size):
        i2 = min(i1 + block_size, columns)
        W1, U1 = W[:, i1:i2].contiguous(), U[i1:i2, i1:i2].contiguous()
        W1 = W1.clone() if W1.data_ptr() == W.data_ptr() else W1
        Q1, E1 = torch.empty_like(W1), torch.empty_like(W1)
        for a, b in _runs(groups, i1, i2):
            if groups[a] not in params:
                params[groups[a]] = params_of(groups[a], W)
            round_columns(W1, U1, grid, params[groups[a]], a - i1, b - i1, Q1, E1)
        codes[:, i1:i2] = Q1
        loss += float(E1.square().sum(dtype=torch.float64)) / 2
        if i2 < columns:
            W[:, i2:] -= E1.matmul(U[i1:i2, i2:])
    return codes, params, loss


def _round_plain(
    W1: Tensor, U1: Tensor, grid: Grid, params: Params, first: int, last: int, Q1: Tensor, E1: Tensor
) -> None:
    """Round columns first..last-1 of a block: any grid, any device. The equations, one line each."""
    for i in range(first, last):
        w = W1[:, i : i + 1]
        code = grid.encode(w, params)
        e = (w - grid.decode(code, params)) / U1[i, i]
        W1[:, i + 1 :] -= e * U1[i, i + 1 :]
        Q1[:, i : i + 1], E1[:, i : i + 1] = code, e


def _round_compiled(
    W1: Tensor, U1: Tensor, grid: Grid, params: Params, first: int, last: int, Q1: Tensor, E1: Tensor
) -> None:
    """The same for affine grids on a CPU (see kernels.py)."""
    scale, zero = (p.flatten().contiguous().numpy() for p in params)
    arrays = W1.numpy(), U1.numpy(), scale, zero
    max_code = arrays[0].dtype.type(grid.max_code)
    sweep_affine(*arrays, max_code, first, last, Q1.numpy(), E1.numpy())


def _runs(groups: list[int], start: int, stop: int) -> list[tuple[int, int]]:
    """Maximal runs of neighbouring columns in start..stop-1 that share a group."""
    cuts = [i for i in range(start + 1, stop) if groups[i] != groups[i - 1]]
    return list(zip([start, *cuts], [*cuts, stop], strict=True))


def _fit_all(W: Tensor, hessian: Tensor | None, grid: Grid) -> list[Params]:
    """Every group's parameters, fitted to the weights as they are now."""
    starts = group_starts(W.shape[1], grid.group_size)
    stops = [*starts[1:], W.shape[1]]
    block = (lambda a, b: None) if hessian is None else (lambda a, b: hessian[a:b, a:b])
    return [grid.fit(W[:, a:b], block(a, b)) for a, b in zip(starts, stops, strict=True)]


def _fit_in_turn(hessian: Tensor | None, group_of_column: Tensor, grid: Grid) -> GroupParams:
    """Fit a group, when asked, to the partly updated weights; groups are runs of swept columns."""

    def fit(group: int, W: Tensor) -> Params:
        members = (group_of_column == group).nonzero().flatten()
        a, b = int(members[0]), int(members[-1]) + 1
        return grid.fit(W[:, a:b], None if hessian is None else hessian[a:b, a:b])

    return fit
