"""GPTQ (Frantar et al., arXiv 2210.17323): round column by column, let later columns absorb the error.

With U the upper Cholesky factor of (H + λ mean(diag H) I)⁻¹, for columns i = 1…in:

    q_i = quant(w_i)                              nearest point on the grid
    e_i = (w_i - q_i) / U_ii                      the error in units of what it costs
    W_:,j ← W_:,j - e_i U_ij      for j > i       optimal update of the columns not yet rounded (eq. 2)

Updates inside a block of `block_size` columns are immediate, those beyond it are applied once per block
(sec. 3.3, lazy batch updates). A group's range is fitted when its first column's turn comes, to the weights as
the last lazy update left them: the original code's choice, so that results equal its own.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from gptq_awq.errors import UserError
from gptq_awq.grids.arithmetic import KINDS, Params, in_numbers
from gptq_awq.grids.base import Fitted, Grid, QuantizedWeight, fit_all, group_of_columns, joined, row_parts
from gptq_awq.kernels import gpu
from gptq_awq.kernels.columns import sweep_columns
from gptq_awq.linalg import NotPositiveDefiniteError, reordered
from gptq_awq.moments import Moments
from gptq_awq.profiling import phase
from gptq_awq.solvers.base import Solution
from gptq_awq.solvers.rtn import RTN


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
    needs_cross: bool = False

    def __post_init__(self) -> None:
        if not self.damping >= 0:
            raise UserError(f"method.solver.damping={self.damping}: give a fraction of the mean diagonal, such as 0.01")
        if self.block_size < 1:
            raise UserError(f"method.solver.block_size={self.block_size}: give a number of columns, such as 128")
        if self.fallback not in ("none", "rtn"):
            raise UserError(f"method.solver.fallback={self.fallback}: choose none or rtn")

    @property
    def natural_groups(self) -> bool:
        """Whether groups are made of neighbouring columns, which every checkpoint format can store."""
        return self.static_groups or not self.act_order

    def solve(self, weight: Float[Tensor, "out in"], moments: Moments | None, grid: Grid) -> Solution:
        """Quantize one weight.

        Raises:
            NotPositiveDefiniteError: H could not be factored and no fallback is declared.
        """
        if moments is None:
            raise ValueError(f"{self.name} needs the moments of the layer's input")
        W = weight.clone()
        # 1. Columns that never see an input cannot matter.
        W.masked_fill_(moments.dead(), 0)
        # 2. Factor the inverse Hessian, in the order that columns are rounded in.
        try:
            U, order, damping = moments.inverse_factor(self.damping, self.act_order)
        except NotPositiveDefiniteError as error:
            if self.fallback == "none":
                raise
            return Solution(RTN().solve(weight, moments, grid).quantized, "rtn", fallback=str(error))
        W = self.target(W, moments, U, order)
        # 3. Fit all groups now, in natural order, or leave each to be fitted when its turn comes.
        hessian = moments.hessian if grid.needs_hessian else None
        group_of_column = group_of_columns(W.shape[1], grid.group_size)
        fitted = _Groups.empty(W, group_of_column, grid)
        if self.static_groups:
            fitted.fit_all(W, hessian)
        # 4. Round, column by column.
        if order is not None:
            _permute(W, order)
            if self.static_groups:
                group_of_column = group_of_column[order.cpu()]
            elif hessian is not None:
                hessian = reordered(hessian, order)
        with phase("solve", *W.shape):
            codes, loss = sweep(W, U, grid, group_of_column, fitted, hessian, self.block_size)
        # 5. Back to the layer's own column order.
        if order is not None:
            inverse = torch.argsort(order)
            _permute(codes, inverse)
            group_of_column = group_of_column[inverse.cpu()]
        quantized = QuantizedWeight.of(grid, codes, fitted.all(), group_of_column, loss)
        raised = f"damping raised from {self.damping:g} to {damping:g}" if damping != self.damping else None
        return Solution(quantized, self.name, damping, raised)

    def target(
        self,
        W: Float[Tensor, "out in"],
        moments: Moments,  # noqa: ARG002
        U: Float[Tensor, "in in"],  # noqa: ARG002
        order: Int[Tensor, "in"] | None,  # noqa: ARG002
    ) -> Float[Tensor, "out in"]:
        """The weight that rounding starts from, in natural column order; GPTQ's is the layer's own.

        Methods of the same recursion that aim elsewhere (gptaq.py, qronos.py) say so here.
        """
        return W


@dataclass
class _Groups:
    """Scales and zeros of all groups, filled in span by span as they are fitted, or all at once."""

    grid: Grid
    scales: Float[Tensor, "out groups"]
    zeros: Float[Tensor, "out groups"]
    span_of_group: Int[Tensor, "groups"]
    stores: dict[int, Mapping[str, Tensor]]
    store: Mapping[str, Tensor] | None = None

    @classmethod
    def empty(cls, W: Tensor, group_of_column: Tensor, grid: Grid) -> "_Groups":
        """None fitted yet."""
        columns, count = W.shape[1], int(group_of_column[-1]) + 1
        span_of_group = torch.zeros(count, dtype=torch.int64)
        span_of_group[group_of_column] = group_of_columns(columns, grid.span)
        return cls(grid, W.new_empty(len(W), count), W.new_empty(len(W), count), span_of_group, {})

    def all(self) -> Fitted:
        """All groups, once every span is fitted."""
        store = joined([self.stores[span] for span in sorted(self.stores)]) if self.store is None else self.store
        return Fitted(self.scales, self.zeros, store)

    def fit_all(self, W: Tensor, hessian: Tensor | None) -> None:
        """Fit every span, columns being in natural order."""
        fitted = fit_all(self.grid, W, hessian)
        self.scales, self.zeros, self.store = fitted.scales, fitted.zeros, fitted.store
        self.stores = {span: {} for span in self.span_of_group.tolist()}

    def fit(self, span: int, W: Tensor, span_of_column: list[int], hessian: Tensor | None) -> None:
        """Fit one span, whose columns are neighbours in W, to the weights as they are."""
        a = span_of_column.index(span)
        b = a + span_of_column.count(span)
        with phase("search"):
            fitted = self.grid.fit(W[:, a:b], None if hessian is None else hessian[a:b, a:b])
        first = int((self.span_of_group < span).sum())
        groups = slice(first, first + fitted.scales.shape[1])
        self.scales[:, groups], self.zeros[:, groups] = fitted.scales, fitted.zeros
        self.stores[span] = fitted.store

    def of(self, columns: Tensor) -> Params:
        """Scale and zero of each of these columns' groups: (out, columns) each."""
        return Fitted(self.scales, self.zeros).per_column(columns)


def sweep(
    W: Float[Tensor, "out in"],
    U: Float[Tensor, "in in"],
    grid: Grid,
    group_of_column: Int[Tensor, "in"],
    groups: _Groups,
    hessian: Float[Tensor, "in in"] | None,
    block_size: int,
) -> tuple[UInt8[Tensor, "out in"], float]:
    """The blocked column sweep, in the order that columns have here. Changes W, and fits what groups are not.

    Returns:
        Codes, and the loss ½ Σ (w_i - q_i)² / U_ii².
    """
    columns, span_of_column = W.shape[1], groups.span_of_group[group_of_column].tolist()
    codes, loss = torch.empty_like(W, dtype=torch.uint8), W.new_zeros((), dtype=torch.float64)
    group_of_column = group_of_column.to(W.device)
    round_columns = _rounding(W.device)
    for i1 in range(0, columns, block_size):
        i2 = min(i1 + block_size, columns)
        # Ranges are fitted to W, which changes between blocks only: all that begin here can be fitted now.
        for span in dict.fromkeys(span_of_column[i1:i2]):
            if span not in groups.stores:
                groups.fit(span, W, span_of_column, hessian)
        W1, U1 = W[:, i1:i2].clone(memory_format=torch.contiguous_format), U[i1:i2, i1:i2].contiguous()
        Q1, E1 = torch.empty_like(W1), torch.empty_like(W1)
        round_columns(W1, U1, grid, groups.of(group_of_column[i1:i2]), Q1, E1)
        codes[:, i1:i2] = Q1
        loss += E1.square().sum(dtype=torch.float64)
        if i2 < columns:
            W[:, i2:].addmm_(E1, U[i1:i2, i2:], alpha=-1)
    return codes, float(loss) / 2


def _permute(matrix: Float[Tensor, "out in"] | UInt8[Tensor, "out in"], order: Int[Tensor, "in"]) -> None:
    """Put the columns into that order, in place: a second weight would not fit beside H and U of the largest layers."""
    for rows in row_parts(matrix):
        matrix[rows] = matrix[rows].index_select(1, order)


def _rounding(device: torch.device) -> Callable[[Tensor, Tensor, Grid, Params, Tensor, Tensor], None]:
    if gpu.available(device):
        return _round_triton
    return _round_compiled if device.type == "cpu" else _round_plain


def _round_triton(W1: Tensor, U1: Tensor, grid: Grid, params: Params, Q1: Tensor, E1: Tensor) -> None:
    """The same, compiled for a GPU (see kernels/triton_columns.py)."""
    from gptq_awq.kernels.triton_columns import sweep_columns  # there is no Triton everywhere

    arithmetic = grid.arithmetic
    kind, levels = KINDS.index(arithmetic.kind), W1.new_tensor(arithmetic.levels)
    sweep_columns(W1, U1, *params, arithmetic.max_code, kind, levels, 0, Q1, E1)


def _round_plain(W1: Tensor, U1: Tensor, grid: Grid, params: Params, Q1: Tensor, E1: Tensor) -> None:
    """Round the columns of a block: any device. The equations, one line each."""
    scales, zeros = params
    for i in range(scales.shape[1]):
        group = scales[:, i : i + 1], zeros[:, i : i + 1]
        w = W1[:, i : i + 1]
        code = grid.encode(w, group)
        e = (w - grid.decode(code, group)) / U1[i, i]
        W1[:, i + 1 :] -= e * U1[i, i + 1 :]
        Q1[:, i : i + 1], E1[:, i : i + 1] = code, e


def _round_compiled(W1: Tensor, U1: Tensor, grid: Grid, params: Params, Q1: Tensor, E1: Tensor) -> None:
    """The same, compiled for a CPU (see kernels/columns.py)."""
    scale, zero = (p.contiguous().numpy() for p in params)
    arithmetic = in_numbers(grid.arithmetic)
    sweep_columns(W1.numpy(), U1.numpy(), scale, zero, *arithmetic, 0, Q1.numpy(), E1.numpy())
